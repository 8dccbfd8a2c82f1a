"""Nemotron 3/4 (Minitron): squared ReLU without a gate, LayerNorm with weights stored minus one."""

from __future__ import annotations

from typing import Any

from upcycle.arch.backbone import Backbone, optional_bias, rope_extras
from upcycle.arch.families.common import EMBEDDING_AND_NORM, PRE_NORM, QKVO, QKVO_BIAS
from upcycle.arch.family import Family, Ffn, block


def backbone(config: Any) -> Backbone:
    return Backbone(
        norm="layernorm_plus_one",
        attention_bias=optional_bias(config),
        windows=(0,) * config.num_hidden_layers,
        extras=rope_extras(config),
    )


FAMILY = Family(
    model_type="nemotron",
    outer={**EMBEDDING_AND_NORM, "model.norm.bias": "H"},
    kinds=block(
        {**QKVO, **PRE_NORM, "input_layernorm.bias": "H", "post_attention_layernorm.bias": "H"},
        optional={"attention_bias": QKVO_BIAS},
        ffn=Ffn(gate=None, bias="mlp_bias"),
    ),
    backbone=backbone,
)
