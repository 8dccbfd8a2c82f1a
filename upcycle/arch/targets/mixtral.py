"""Mixtral: a Mistral whose router always renormalises (topK-then-softmax)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from upcycle.arch.target import Layout, Target, native_fields

if TYPE_CHECKING:
    from upcycle.arch.family import DenseModel
    from upcycle.arch.moe import MoeShape


def fields(model: DenseModel, moe: MoeShape) -> dict[str, Any]:
    return {
        **native_fields(model),
        "intermediate_size": moe.expert_width,
        "num_local_experts": moe.experts,
        "num_experts_per_tok": moe.top_k,
        "sliding_window": model.backbone.windows[0] or None,
    }


TARGET = Target(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    reward=True,
    windows="uniform",
    router_orders=("topk_softmax",),
    layout=Layout(
        router="block_sparse_moe.gate.weight",
        experts={
            "gate": "block_sparse_moe.experts.{expert}.w1.weight",
            "up": "block_sparse_moe.experts.{expert}.w3.weight",
            "down": "block_sparse_moe.experts.{expert}.w2.weight",
        },
    ),
    fields=fields,
)
