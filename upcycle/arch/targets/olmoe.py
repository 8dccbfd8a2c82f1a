"""OLMoE: queries and keys normalised over all heads, norms before the blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from upcycle.arch.target import PER_EXPERT, Layout, Target, native_fields, router_fields

if TYPE_CHECKING:
    from upcycle.arch.family import DenseModel
    from upcycle.arch.moe import MoeShape


def fields(model: DenseModel, moe: MoeShape) -> dict[str, Any]:
    return {
        **native_fields(model),
        "attention_bias": model.backbone.attention_bias == "qkvo",
        "intermediate_size": moe.expert_width,
        **router_fields(moe),
        "clip_qkv": None,
    }


TARGET = Target(
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    qk_norm="full",
    attention_bias=("none", "qkvo"),
    layout=Layout(experts=PER_EXPERT),
    fields=fields,
)
