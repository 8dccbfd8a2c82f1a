"""Llama and everything that uses its layout: SmolLM, TinyLlama, Yi."""

from __future__ import annotations

from typing import Any

from upcycle.arch.backbone import Backbone, optional_bias, rope_extras
from upcycle.arch.families.common import EMBEDDING_AND_NORM, PRE_NORM, QKVO, QKVO_BIAS
from upcycle.arch.family import Family, Ffn, block


def backbone(config: Any) -> Backbone:
    return Backbone(
        attention_bias=optional_bias(config),
        windows=(0,) * config.num_hidden_layers,
        extras=rope_extras(config),
    )


FAMILY = Family(
    model_type="llama",
    outer=EMBEDDING_AND_NORM,
    kinds=block({**QKVO, **PRE_NORM}, optional={"attention_bias": QKVO_BIAS}, ffn=Ffn(bias="mlp_bias")),
    backbone=backbone,
)
