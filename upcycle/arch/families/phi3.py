"""Phi-3 and Phi-4-mini: a Llama whose projections are fused."""

from __future__ import annotations

from typing import Any

from upcycle.arch.backbone import Backbone, layer_windows, rope_extras
from upcycle.arch.families.common import EMBEDDING_AND_NORM, PRE_NORM
from upcycle.arch.family import Family, Ffn, Rows, block


def backbone(config: Any) -> Backbone:
    dropped = {name: getattr(config, name, 0.0) for name in ("resid_pdrop", "embd_pdrop")}
    rope_type = config.rope_parameters["rope_type"]
    return Backbone(
        windows=layer_windows(config),
        extras=(
            *rope_extras(config),
            *(f"{name}={value}" for name, value in dropped.items() if value),
            *((f"rope_type={rope_type} with Phi-3's switch of factors",) if rope_type == "longrope" else ()),
        ),
    )


QKV = "self_attn.qkv_proj.weight"
GATE_UP = "mlp.gate_up_proj.weight"

FAMILY = Family(
    model_type="phi3",
    outer=EMBEDDING_AND_NORM,
    kinds=block(
        {QKV: "Q+2*K H", "self_attn.o_proj.weight": "H Q", **PRE_NORM}, ffn=Ffn(gate="gate_up_proj", up="gate_up_proj")
    ),
    native_names={
        "self_attn.q_proj.weight": Rows(tensor=QKV, stop="Q"),
        "self_attn.k_proj.weight": Rows(tensor=QKV, start="Q", stop="Q+K"),
        "self_attn.v_proj.weight": Rows(tensor=QKV, start="Q+K", stop="Q+2*K"),
        "mlp.gate_proj.weight": Rows(tensor=GATE_UP, stop="F"),
        "mlp.up_proj.weight": Rows(tensor=GATE_UP, start="F", stop="2*F"),
    },
    backbone=backbone,
)
