"""FlexOlmo: OLMo 2 with experts."""

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
    }


TARGET = Target(
    model_type="flex_olmo",
    architecture="FlexOlmoForCausalLM",
    norm_placement="post",
    qk_norm="full",
    attention_bias=("none", "qkvo"),
    layout=Layout(experts=PER_EXPERT),
    fields=fields,
)
