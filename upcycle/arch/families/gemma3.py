"""Gemma 3, text only: Gemma 2 with normalised queries and keys and two rotary bases."""

from __future__ import annotations

from typing import Any

from upcycle.arch.backbone import Backbone, layer_windows, optional_bias
from upcycle.arch.families.common import EMBEDDING_AND_NORM, HEAD_QK_NORM, QKVO, QKVO_BIAS, SANDWICH_NORM
from upcycle.arch.family import Family, block


def backbone(config: Any) -> Backbone:
    return Backbone(
        norm="rmsnorm_plus_one",
        norm_placement="sandwich",
        qk_norm="head",
        attention_bias=optional_bias(config),
        windows=layer_windows(config),
        extras=("embeddings scaled by sqrt(hidden_size)", "query_pre_attn_scalar", "rotary base by layer type"),
    )


FAMILY = Family(
    model_type="gemma3_text",
    outer=EMBEDDING_AND_NORM,
    kinds=block({**QKVO, **HEAD_QK_NORM, **SANDWICH_NORM}, optional={"attention_bias": QKVO_BIAS}),
    activation="hidden_activation",
    backbone=backbone,
)
