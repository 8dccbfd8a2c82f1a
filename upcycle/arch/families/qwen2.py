"""Qwen2 and Qwen2.5: biases on queries, keys and values, a sliding window on some layers."""

from __future__ import annotations

from typing import Any

from upcycle.arch.backbone import Backbone, layer_windows, rope_extras
from upcycle.arch.families.common import EMBEDDING_AND_NORM, PRE_NORM, QKV_BIAS, QKVO
from upcycle.arch.family import Family, block


def backbone(config: Any) -> Backbone:
    return Backbone(attention_bias="qkv", windows=layer_windows(config), extras=rope_extras(config))


FAMILY = Family(
    model_type="qwen2",
    outer=EMBEDDING_AND_NORM,
    kinds=block({**QKVO, **QKV_BIAS, **PRE_NORM}),
    backbone=backbone,
)
