"""GraniteMoeShared: a Llama with biases and a plain shared expert; topK-then-softmax."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from upcycle.arch.target import Layout, Target, native_fields

if TYPE_CHECKING:
    from upcycle.arch.family import DenseModel
    from upcycle.arch.moe import MoeShape


def fields(model: DenseModel, moe: MoeShape) -> dict[str, Any]:
    return {
        **native_fields(model),
        "attention_bias": model.backbone.attention_bias == "qkvo",
        "intermediate_size": moe.expert_width,
        "shared_intermediate_size": moe.shared_width,
        "num_local_experts": moe.experts,
        "num_experts_per_tok": moe.top_k,
        "attention_multiplier": model.sizes["D"] ** -0.5,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
    }


TARGET = Target(
    model_type="granitemoeshared",
    architecture="GraniteMoeSharedForCausalLM",
    attention_bias=("none", "qkvo"),
    router_orders=("topk_softmax",),
    shared=True,
    layout=Layout(
        router="block_sparse_moe.router.layer.weight",
        experts={
            "gate_up": "block_sparse_moe.input_linear.weight",
            "down": "block_sparse_moe.output_linear.weight",
        },
        shared={"gate_up": "shared_mlp.input_linear.weight", "down": "shared_mlp.output_linear.weight"},
    ),
    blocks=("block_sparse_moe", "shared_mlp"),
    router_module="block_sparse_moe.router",
    indices_first_before=(5, 21),
    fields=fields,
)
