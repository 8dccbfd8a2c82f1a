"""Qwen3: queries and keys normalised per head."""

from __future__ import annotations

from typing import Any

from upcycle.arch.backbone import Backbone, layer_windows, optional_bias, rope_extras
from upcycle.arch.families.common import EMBEDDING_AND_NORM, HEAD_QK_NORM, PRE_NORM, QKVO, QKVO_BIAS
from upcycle.arch.family import Family, block


def backbone(config: Any) -> Backbone:
    return Backbone(
        qk_norm="head",
        attention_bias=optional_bias(config),
        windows=layer_windows(config),
        extras=rope_extras(config),
    )


FAMILY = Family(
    model_type="qwen3",
    outer=EMBEDDING_AND_NORM,
    kinds=block({**QKVO, **HEAD_QK_NORM, **PRE_NORM}, optional={"attention_bias": QKVO_BIAS}),
    backbone=backbone,
)
