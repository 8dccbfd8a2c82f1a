"""Nemotron 3's mixture: sigmoids, un-gated experts, a shared expert in every MoE layer, the scale in config.json."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from upcycle.arch.families.nemotron_h import FAMILY, LETTERS, ahead_pattern, pattern
from upcycle.arch.target import OF_THE_FILE, Layout, Target

if TYPE_CHECKING:
    from collections.abc import Mapping

    from upcycle.arch.family import DenseModel
    from upcycle.arch.moe import MoeShape

REPLACED = (*OF_THE_FILE, "model_type", "architectures", "auto_map")
TODAY = {letter: names[0] for letter, names in LETTERS.items()}


def fields(model: DenseModel, moe: MoeShape) -> dict[str, Any]:
    kinds = ("E" if layer in moe.layers else kind for layer, kind in enumerate(model.pattern))
    return {
        **_storable({name: value for name, value in model.config.to_dict().items() if name not in REPLACED}),
        "layers_block_type": [TODAY[kind] for kind in kinds],
        "n_routed_experts": moe.experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.expert_width,
        "n_shared_experts": 1,
        "moe_shared_expert_intermediate_size": max(1, moe.shared_width),
        "moe_latent_size": moe.latent,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
    }


def _storable(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields without a limit of time steps that is none: JSON has no infinity, and engines read numbers there."""
    bounds = config.get("time_step_limit") or ()
    limited = all(isinstance(bound, int | float) and math.isfinite(bound) for bound in bounds)
    return {name: value for name, value in config.items() if name != "time_step_limit" or limited}


def spelling(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json as NVIDIA writes it, which every engine reads: patterns of letters for lists of names."""
    lists = ("layers_block_type", "mtp_layers_block_type")
    written = {name: value for name, value in _storable(config).items() if name not in lists}
    letters = "".join(pattern(config))
    if config.get("num_nextn_predict_layers") and config.get("mtp_layers_block_type"):
        written["mtp_hybrid_override_pattern"] = "".join(ahead_pattern(config))
    return {**written, "hybrid_override_pattern": letters, "num_hidden_layers": len(letters)}


TARGET = Target(
    model_type="nemotron_h",
    architecture="NemotronHForCausalLM",
    family=FAMILY.model_type,
    router_orders=("sigmoid_topk",),
    shared=True,
    dense_layers=True,
    ahead=True,
    gated=False,
    float32_router=True,
    scale_field="routed_scaling_factor",
    layout=Layout(
        router="mixer.gate.weight",
        correction_bias="mixer.gate.e_score_correction_bias",
        experts={
            "up": "mixer.experts.{expert}.up_proj.weight",
            "down": "mixer.experts.{expert}.down_proj.weight",
        },
        shared={"up": "mixer.shared_experts.up_proj.weight", "down": "mixer.shared_experts.down_proj.weight"},
        shared_least=1,
        latent=("mixer.fc1_latent_proj.weight", "mixer.fc2_latent_proj.weight"),
    ),
    blocks=("mixer",),
    router_module="mixer.gate",
    fields=fields,
    spelling=spelling,
)
