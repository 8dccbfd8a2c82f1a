"""GPT-2: matrices stored [in, out], learned positions, biases everywhere."""

from __future__ import annotations

from typing import Any

from upcycle.arch.backbone import Backbone
from upcycle.arch.family import Family, Ffn, block


def backbone(config: Any) -> Backbone:
    return Backbone(
        norm="layernorm",
        attention_bias="qkvo",
        windows=(0,) * config.num_hidden_layers,
        extras=("learned positions",),
    )


FAMILY = Family(
    model_type="gpt2",
    layer="transformer.h.{layer}.",
    outer={
        "transformer.wte.weight": "V H",
        "transformer.wpe.weight": "P H",
        "transformer.ln_f.weight": "H",
        "transformer.ln_f.bias": "H",
    },
    kinds=block(
        {
            "ln_1.weight": "H",
            "ln_1.bias": "H",
            "attn.c_attn.weight": "H 3*H",
            "attn.c_attn.bias": "3*H",
            "attn.c_proj.weight": "H H",
            "attn.c_proj.bias": "H",
            "ln_2.weight": "H",
            "ln_2.bias": "H",
        },
        ffn=Ffn(gate=None, up="c_fc", down="c_proj", bias=True, transposed=True, dropout="resid_pdrop"),
    ),
    activation="activation_function",
    backbone=backbone,
    ignored=(".attn.bias", ".attn.masked_bias"),
    base_prefix="transformer.",
)
