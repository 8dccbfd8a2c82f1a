"""Shipped sweeps run for real at scale=smoke, in this process: a second a run instead of a process a run."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from hydra import compose, initialize_config_dir

from upcycle.options.arguments import CONF
from upcycle.sweep.index import write_index
from upcycle.sweep.plan import COMMAND, arm_config, plan_sweep
from upcycle.train.run import train

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


def run_sweep(name: str, output: Path, overrides: Sequence[str]) -> None:
    """Run what has not finished, as `upcycle train -m +sweeps=NAME scale=smoke output=OUTPUT …` does."""
    given = [f"+sweeps={name}", "scale=smoke", *overrides]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose(COMMAND, overrides=given)
        plan = plan_sweep(composed, name=name, overrides=given, output=output, ranks=1, execute=True)
        configs = {arm.name: arm_config(arm, given, seed=composed.seed) for arm in plan.arms}
    write_index(plan, output)
    for job in plan.left:
        train(replace(configs[job.arm], seed=job.seed, output=str(job.directory)), on_start=lambda _run: [])
