"""Qwen3-MoE: queries and keys normalised per head, no shared expert."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from upcycle.arch.target import PER_EXPERT, Layout, Target, dense_layer_indices, native_fields, router_fields

if TYPE_CHECKING:
    from upcycle.arch.family import DenseModel
    from upcycle.arch.moe import MoeShape


def fields(model: DenseModel, moe: MoeShape) -> dict[str, Any]:
    window = model.backbone.windows[0]
    return {
        **native_fields(model),
        "attention_bias": model.backbone.attention_bias == "qkvo",
        "intermediate_size": model.ffn_width,
        "moe_intermediate_size": moe.expert_width,
        **router_fields(moe),
        "mlp_only_layers": dense_layer_indices(model, moe),
        "use_sliding_window": bool(window),
        "sliding_window": window or None,
    }


TARGET = Target(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    reward=True,
    qk_norm="head",
    attention_bias=("none", "qkvo"),
    windows="uniform",
    dense_layers=True,
    layout=Layout(experts=PER_EXPERT),
    fields=fields,
    old_names={"num_experts": "num_local_experts"},
)
