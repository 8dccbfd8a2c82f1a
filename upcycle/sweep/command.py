"""What `upcycle plan-sweep` and `upcycle train -m +sweeps=NAME` print and return."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from rich.console import Console

from upcycle.errors import ConfigError
from upcycle.source import expanded
from upcycle.sweep.plan import SweepPlan, plan_sweep
from upcycle.sweep.render import endings_table, plan_table, unfinished
from upcycle.sweep.run import endings, run_sweep

if TYPE_CHECKING:
    from pathlib import Path

    from omegaconf import DictConfig

GROUP = "sweeps"


def show(composed: DictConfig) -> int:
    """`upcycle plan-sweep`: what a sweep would run and cost, or everything that is wrong with it."""
    output = expanded("." if OmegaConf.is_missing(composed, "output") else composed.output)
    Console().print(plan_table(_plan(composed, output, execute=False), free=_free(output)))
    return 0


def train(composed: DictConfig) -> int:
    """`upcycle train -m +sweeps=NAME`: run what has not finished, then list all; 1 if a run did not finish."""
    if OmegaConf.is_missing(composed, "output"):
        raise ConfigError("a required option is missing", found="nothing", expected="output=…", remedy="add output=DIR")
    output = expanded(composed.output)
    plan = _plan(composed, output, execute=True)
    Console(stderr=True).print(plan_table(plan, free=_free(output)))
    given = HydraConfig.get().overrides
    run_sweep(plan, output=output, overrides=given.task, launcher=given.hydra)
    ended = endings(plan)
    Console().print(endings_table(plan, ended))
    left = unfinished(ended)
    if left:
        print(left)
    return 1 if left else 0


def _plan(composed: DictConfig, output: Path, *, execute: bool) -> SweepPlan:
    choices = HydraConfig.get().runtime.choices
    if GROUP not in choices:
        raise ConfigError("there is no sweep", found="nothing", expected="+sweeps=NAME", remedy="add +sweeps=NAME")
    return plan_sweep(
        composed, name=choices[GROUP], overrides=HydraConfig.get().overrides.task, output=output, execute=execute
    )


def _free(output: Path) -> int:
    existing = next(parent for parent in (output.absolute(), *output.absolute().parents) if parent.exists())
    return shutil.disk_usage(existing).free
