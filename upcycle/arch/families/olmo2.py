"""OLMo 2: norms after the blocks, queries and keys normalised over all heads."""

from __future__ import annotations

from typing import Any

from upcycle.arch.backbone import Backbone, optional_bias, rope_extras
from upcycle.arch.families.common import EMBEDDING_AND_NORM, FULL_QK_NORM, POST_NORM, QKVO, QKVO_BIAS
from upcycle.arch.family import Family, block


def backbone(config: Any) -> Backbone:
    return Backbone(
        norm_placement="post",
        qk_norm="full",
        attention_bias=optional_bias(config),
        windows=(0,) * config.num_hidden_layers,
        extras=rope_extras(config),
    )


FAMILY = Family(
    model_type="olmo2",
    outer=EMBEDDING_AND_NORM,
    kinds=block({**QKVO, **FULL_QK_NORM, **POST_NORM}, optional={"attention_bias": QKVO_BIAS}),
    backbone=backbone,
)
