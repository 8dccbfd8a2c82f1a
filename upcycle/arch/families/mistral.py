"""Mistral: a Llama with one sliding window for all layers."""

from __future__ import annotations

from typing import Any

from upcycle.arch.backbone import Backbone, layer_windows, rope_extras
from upcycle.arch.families.common import EMBEDDING_AND_NORM, PRE_NORM, QKVO
from upcycle.arch.family import Family, block


def backbone(config: Any) -> Backbone:
    return Backbone(windows=layer_windows(config), extras=rope_extras(config))


FAMILY = Family(
    model_type="mistral",
    outer=EMBEDDING_AND_NORM,
    kinds=block({**QKVO, **PRE_NORM}),
    backbone=backbone,
)
