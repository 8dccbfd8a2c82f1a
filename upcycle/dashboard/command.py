"""`upcycle dashboard`: the W&B workspace of a sweep, printed, written or sent."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig

from upcycle.convert.prepare import prepare
from upcycle.dashboard.workspace import as_json, build_workspace, push
from upcycle.files.durable import write_text
from upcycle.models.config import read_config
from upcycle.models.moe import describe_moe, target_of
from upcycle.models.source import expanded
from upcycle.sweep.command import sweep_name
from upcycle.sweep.plan import arm_config, plan_sweep
from upcycle.tracking.record import NOT_COMPARED, flat
from upcycle.train.models import conversion_request

if TYPE_CHECKING:
    from collections.abc import Sequence

    from omegaconf import DictConfig

    from upcycle.train.config import TrainConfig

OWN = ("push", "output")  # options of the command, not of the runs
SEED = "seed"


def dashboard(composed: DictConfig) -> int:
    """`upcycle dashboard`: the workspace as JSON, or the URL that it has at W&B.

    Raises:
        ConfigError: no sweep, or one that is not valid.
        MissingPackageError: wandb-workspaces is not installed.
        RecordError: the server did not take it.
    """
    name = sweep_name()
    given = [each for each in HydraConfig.get().overrides.task if each.partition("=")[0] not in OWN]
    plan = plan_sweep(composed, name=name, overrides=given, output=Path(), ranks=None, execute=False)
    configs = [arm_config(arm, given, seed=composed.seed) for arm in plan.arms]
    workspace = build_workspace(
        plan.name,
        entity=composed.wandb.entity,
        project=composed.wandb.project,
        group=composed.wandb.group or plan.name,
        options=naming_options(configs, first=[each.partition("=")[0] for arm in plan.arms for each in arm.overrides]),
        metric=plan.sweep.metric,
        layers=tuple(sorted({layer for config in configs for layer in _moe_layers(config)})),
        texts={text: getattr(plan.sweep, text) for text in ("question", "hypothesis", "published")},
    )
    if composed.output:
        write_text(expanded(composed.output), as_json(workspace) + "\n")
    if composed.push:
        print(push(workspace))
    elif not composed.output:
        print(as_json(workspace))
    return 0


def naming_options(configs: Sequence[TrainConfig], *, first: Sequence[str]) -> list[str]:
    """The fewest options, or nearly, whose values tell the arms apart.

    Args:
        configs: of the arms.
        first: options to be preferred, such as those that the sweep names.
    """
    options = [flat(asdict(config)) for config in configs]
    differing = [
        path
        for path in options[0]
        if path != SEED
        and path.partition(".")[0] not in NOT_COMPARED
        and len({json.dumps(each.get(path)) for each in options}) > 1
    ]
    differing.sort(key=lambda path: not path.startswith(tuple(first)))

    def told_apart(paths: Sequence[str]) -> int:
        return len({json.dumps([each.get(path) for path in paths]) for each in options})

    chosen: list[str] = []
    while told_apart(chosen) < len(options):
        chosen.append(max(differing, key=lambda path: told_apart([*chosen, path])))
    return chosen


def _moe_layers(config: TrainConfig) -> tuple[int, ...]:
    """Indices of the MoE layers that a run will have."""
    if config.model == "checkpoint":
        directory = expanded(str(config.source))
        return describe_moe(directory).layers if target_of(read_config(directory)) else ()
    if config.model == "dense" or config.architecture is not None:
        return ()
    return prepare(conversion_request(config), execute=False).plan.moe.layers
