"""Gemma 1: norm weights stored minus one, embeddings scaled."""

from __future__ import annotations

from typing import Any

from upcycle.arch.backbone import Backbone, optional_bias
from upcycle.arch.families.common import EMBEDDING_AND_NORM, PRE_NORM, QKVO, QKVO_BIAS
from upcycle.arch.family import Family, block


def backbone(config: Any) -> Backbone:
    return Backbone(
        norm="rmsnorm_plus_one",
        attention_bias=optional_bias(config),
        windows=(0,) * config.num_hidden_layers,
        extras=("embeddings scaled by sqrt(hidden_size)",),
    )


FAMILY = Family(
    model_type="gemma",
    outer=EMBEDDING_AND_NORM,
    kinds=block({**QKVO, **PRE_NORM}, optional={"attention_bias": QKVO_BIAS}),
    backbone=backbone,
)
