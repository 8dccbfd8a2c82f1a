"""OLMo 1: LayerNorm without weights, clipped queries, keys and values."""

from __future__ import annotations

from typing import Any

from upcycle.arch.backbone import Backbone, optional_bias
from upcycle.arch.families.common import EMBEDDING, QKVO, QKVO_BIAS
from upcycle.arch.family import Family, block


def backbone(config: Any) -> Backbone:
    return Backbone(
        norm="layernorm_without_weights",
        attention_bias=optional_bias(config),
        windows=(0,) * config.num_hidden_layers,
        extras=(f"clip_qkv={config.clip_qkv}",) if config.clip_qkv is not None else (),
    )


FAMILY = Family(
    model_type="olmo",
    outer=EMBEDDING,
    kinds=block(QKVO, optional={"attention_bias": QKVO_BIAS}),
    backbone=backbone,
)
