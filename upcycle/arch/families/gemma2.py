"""Gemma 2: norms on both sides of every block, capped logits, alternating sliding windows."""

from __future__ import annotations

from typing import Any

from upcycle.arch.backbone import Backbone, layer_windows, optional_bias
from upcycle.arch.families.common import EMBEDDING_AND_NORM, QKVO, QKVO_BIAS, SANDWICH_NORM
from upcycle.arch.family import Family, block


def backbone(config: Any) -> Backbone:
    return Backbone(
        norm="rmsnorm_plus_one",
        norm_placement="sandwich",
        attention_bias=optional_bias(config),
        windows=layer_windows(config),
        extras=("embeddings scaled by sqrt(hidden_size)", "query_pre_attn_scalar", "logit softcapping"),
    )


FAMILY = Family(
    model_type="gemma2",
    outer=EMBEDDING_AND_NORM,
    kinds=block({**QKVO, **SANDWICH_NORM}, optional={"attention_bias": QKVO_BIAS}),
    activation="hidden_activation",
    backbone=backbone,
)
