"""Qwen2-MoE: both router orders, a shared expert behind a sigmoid, dense layers between."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from upcycle.arch.families.common import QKV_BIAS
from upcycle.arch.padding import Padding
from upcycle.arch.target import PER_EXPERT, Layout, Target, dense_layer_indices, native_fields, router_fields

if TYPE_CHECKING:
    from upcycle.arch.family import DenseModel
    from upcycle.arch.moe import MoeShape


def fields(model: DenseModel, moe: MoeShape) -> dict[str, Any]:
    windows = model.backbone.windows
    return {
        **native_fields(model),
        "qkv_bias": model.backbone.attention_bias == "qkv",
        "intermediate_size": model.ffn_width,
        "moe_intermediate_size": moe.expert_width,
        "shared_expert_intermediate_size": moe.shared_width,
        **router_fields(moe),
        "mlp_only_layers": dense_layer_indices(model, moe),
        "use_sliding_window": any(windows),
        "sliding_window": max(windows) or None,
        "layer_types": ["sliding_attention" if window else "full_attention" for window in windows],
    }


TARGET = Target(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    reward=True,
    attention_bias=("none", "qkv"),
    windows="mixed",
    shared=True,
    dense_layers=True,
    layout=Layout(
        experts=PER_EXPERT,
        shared={
            "gate": "mlp.shared_expert.gate_proj.weight",
            "up": "mlp.shared_expert.up_proj.weight",
            "down": "mlp.shared_expert.down_proj.weight",
        },
        shared_gate="mlp.shared_expert_gate.weight",
        shared_least=0,
    ),
    fields=fields,
    padding=Padding(
        bias_field="qkv_bias",
        biases=QKV_BIAS,
        width_field="shared_expert_intermediate_size",
    ),
)
