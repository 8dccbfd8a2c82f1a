"""The files of a recipe, from a model, its training and a layout."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from upcycle.data.config import MIXTURE
from upcycle.megatron.support import BRIDGE, CORE, KERNELS, OWN_BRIDGES, TRANSFORMERS
from upcycle.routing.config import Schedule
from upcycle.train.schedule import cosine_steps, in_steps

if TYPE_CHECKING:
    from upcycle.models.moe import MoeDescription
    from upcycle.parallel.gpu import Gpu
    from upcycle.parallel.step import Step
    from upcycle.train.config import TrainConfig

FILES = Path(__file__).parent / "files"
STYLES = {"cosine": "cosine", "reset": "cosine", "wsd": "WSD", "constant": "constant"}
BALANCING = {"micro_batch": "aux_loss", "global_batch": "global_aux_loss"}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a recipe is made from.

    Attributes:
        moe: the model.
        train: how it is trained, as far as Megatron can express it.
        steps: optimizer steps.
        step: one of them, in its layout.
        gpu, nodes: what it runs on.
    """

    moe: MoeDescription
    train: TrainConfig
    steps: int
    step: Step
    gpu: Gpu
    nodes: int


def torn_groups(moe: MoeDescription) -> str:
    """What Megatron does to virtual groups, in a line."""
    return f"Router rows are trained one by one: the virtual groups of {moe.name} come apart in some ten steps"


def recipe_files(recipe: Recipe) -> dict[str, str]:
    """The files' texts by name."""
    own = OWN_BRIDGES.get(recipe.moe.model_type)
    names = ["recipe.py", "train.sbatch", "tokenize_data.py", "requirements.txt", *([f"{own}.py"] if own else [])]
    values = {
        **_surroundings(recipe),
        **_layout(recipe),
        **_routing(recipe),
        **_training(recipe),
        **_data(recipe),
        "groups": f"\n{torn_groups(recipe.moe)}." if recipe.moe.granularity > 1 else "",
        "imports": f"import {own}  # noqa: F401  (registers the bridge)\nimport torch" if own else "import torch",
    }
    return {name: Template((FILES / f"{name}.in").read_text()).substitute(values) for name in names}


def _surroundings(recipe: Recipe) -> dict[str, Any]:
    return {
        "kernels": "".join(f"\n{each}" for each in KERNELS.get(recipe.moe.model_type, ())),
        "version": version("upcycle"),
        "bridge": BRIDGE,
        "core": CORE,
        "transformers": TRANSFORMERS,
        "model_type": recipe.moe.model_type,
        "name": f"{recipe.moe.model_type}-{recipe.moe.name}",
        "gpu": recipe.gpu.name,
        "gpus": recipe.gpu.gpus_per_node,
        "nodes": recipe.nodes,
        "precision": recipe.train.precision,
    }


def _layout(recipe: Recipe) -> dict[str, Any]:
    layout, workload, chunks = recipe.step.layout, recipe.step.workload, recipe.step.chunks
    recompute = workload.activation_checkpointing
    interleaved = chunks > 1 and not recipe.step.sizes.separate  # Megatron-Bridge has no virtual stages of hybrids
    return {
        "layout": layout.name,
        **{name: getattr(layout, name) for name in ("tp", "cp", "pp", "etp", "ep")},
        "virtual": chunks if interleaved else None,
        "sequence_parallel": layout.tp > 1,
        "sequence_length": f"{workload.sequence_length:_}",
        "sequences": workload.sequences,
        "micro": workload.micro,
        "recompute": '"full"' if recompute else None,
        "recompute_method": '"uniform"' if recompute else None,
        "recompute_layers": 1 if recompute else None,
    }


def _routing(recipe: Recipe) -> dict[str, Any]:
    moe, router, balance = recipe.moe, recipe.train.router, recipe.train.balance
    assert not isinstance(balance.aux_loss, Schedule)
    assert not isinstance(balance.z_loss, Schedule)
    assert not isinstance(balance.bias_update, Schedule)
    layers = len(moe.layers)
    return {
        "score": "sigmoid" if moe.router_order == "sigmoid_topk" else "softmax",
        "order": moe.router_order,
        "pre_softmax": moe.router_order == "softmax_topk",
        "scaling_factor": moe.scaling_factor if moe.router_order == "sigmoid_topk" else None,
        "correction_bias": moe.target.layout.correction_bias is not None,
        "bias_update": balance.bias_update,
        "layers": layers,
        "balancing": BALANCING[balance.statistics] if balance.aux_loss else "none",
        "aux_loss": balance.aux_loss / layers,
        "z_loss": balance.z_loss / layers or None,
        "jitter": router.jitter or None,
        "capacity": router.capacity_factor,
    }


def _training(recipe: Recipe) -> dict[str, Any]:
    train, schedule, optim, workload = recipe.train, recipe.train.schedule, recipe.train.optim, recipe.step.workload
    tokens_per_step = workload.sequences * workload.sequence_length
    cosine = cosine_steps(schedule, steps=recipe.steps, tokens_per_step=tokens_per_step)
    return {
        "seed": train.seed,
        "steps": f"{recipe.steps:_}",
        "style": STYLES[schedule.name],
        "peak": schedule.peak,
        "final": schedule.final,
        "warmup": in_steps(schedule.warmup, recipe.steps),
        "decay_steps": cosine if schedule.name == "reset" else "STEPS",
        "wsd_steps": in_steps(schedule.decay, recipe.steps) if schedule.name == "wsd" else None,
        **{name: getattr(optim, name) for name in ("weight_decay", "beta1", "beta2", "eps")},
        "clip": optim.clip or 0.0,
        "save_interval": train.checkpoint_every,
        "log_interval": train.log_every,
    }


def _data(recipe: Recipe) -> dict[str, Any]:
    data, validation, sequences = recipe.train.data, recipe.train.validation, recipe.step.workload.sequences
    weights = data.weights() if data.name == MIXTURE else {"data": 1.0}
    batches = math.ceil((validation.windows or sequences) / sequences)
    return {
        "weights": json.dumps(weights),
        "held_out": data.held_out,
        "held_out_blend": '([f"{prefix}-held-out" for prefix in PREFIXES], SHARES)' if data.held_out else None,
        "eval_interval": validation.every,
        "eval_iters": batches if data.held_out else 0,
    }
