"""Runs a sweep through any of Hydra's launchers, and says how its runs ended."""

from __future__ import annotations

import logging
import os
import signal
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.types import HydraContext, RunMode

from upcycle.checkpoint.renames import check_renames
from upcycle.errors import ConfigError
from upcycle.options.arguments import quoted
from upcycle.sweep.expand import literal
from upcycle.sweep.index import write_index
from upcycle.sweep.job import content_of, last_lines, run_job
from upcycle.sweep.plan import COMMAND
from upcycle.tracking.status import FINISHED
from upcycle.tracking.tags import sweep_tags

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path
    from types import FrameType

    from omegaconf import DictConfig

    from upcycle.sweep.plan import Job, SweepPlan

TORCHRUN = "TORCHELASTIC_RUN_ID"
_log = logging.getLogger("upcycle")


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a run ended.

    Attributes:
        job: the run.
        status: finished, interrupted, failed, running (it was killed) or None (it never began).
        value: of the sweep's metric, if the run finished and has it.
        error: the last lines of what a run that did not finish printed.
    """

    job: Job
    status: str | None
    value: float | None
    error: tuple[str, ...]


def ranks_of_a_run() -> int:
    """Tasks that the launcher starts for each run. Only submitit's launchers start several.

    Raises:
        ConfigError: not as many as the layout of the runs is for: several with one, and one without.
    """
    config: Any = HydraConfig.get()
    tasks: int = config.launcher.get("nodes", 1) * config.launcher.get("tasks_per_node", 1)
    layout = config.runtime.choices.parallel
    if (layout is None) != (tasks == 1) or TORCHRUN in os.environ:
        started = "torchrun starts the sweep" if TORCHRUN in os.environ else f"its launcher starts {tasks} for each"
        raise ConfigError(
            "a sweep starts the ranks of its runs, as many as their layout is for",
            found=f"parallel={layout or 'null'}, and {started}",
            expected="several ranks with a layout, and one without",
            remedy="hydra/launcher=slurm hydra.launcher.nodes=2 hydra.launcher.tasks_per_node=8, or submitit_local",
        )
    return tasks


def run_sweep(plan: SweepPlan, *, output: Path, overrides: Sequence[str], launcher: Sequence[str]) -> None:
    """Run what has not finished. How each run ended is in its directory, whatever becomes of the launcher.

    Args:
        plan: the sweep.
        output: directory of all runs.
        overrides: the sweep's command line.
        launcher: what of it is for Hydra.

    Raises:
        OutputError: the output cannot be written, or its file system has no locks, or does not rename in one step.
    """
    where = (f"hydra.sweep.dir={quoted(str(output))}", "hydra.sweep.subdir=.")
    hydra: Any = GlobalHydra.instance().hydra
    config: DictConfig = hydra.compose_config(
        config_name=COMMAND, overrides=[*overrides, *launcher, *where], run_mode=RunMode.MULTIRUN
    )
    check_renames(output / "run")
    write_index(plan, output)
    waiting = plan.left
    group = f"wandb.group={quoted(plan.name)}"  # first, so that the command line may name another
    tags = [f"wandb.tags={literal([*config.wandb.tags, *sweep_tags(plan.name, job.arm)])}" for job in waiting]
    jobs = [
        [group, *overrides, *job.overrides, tagged, *_as_job(job, f"{n} of {len(waiting)}")]
        for n, (job, tagged) in enumerate(zip(waiting, tags, strict=True), 1)
    ]
    if jobs:
        _launch(jobs, config, HydraContext(config_loader=hydra.config_loader, callbacks=Callbacks(config)))


def endings(plan: SweepPlan) -> tuple[Ending, ...]:
    """How the runs of a sweep ended, as their directories or packs say."""
    return tuple(_ending(job, plan.sweep.metric) for job in plan.jobs)


def _as_job(job: Job, number: str) -> tuple[str, ...]:
    label = quoted(f"{number}: {job.arm}, seed {job.seed}")
    where = f"output={quoted(str(job.directory))}"
    return (where, "resume=auto", "overwrite=false", "progress=false", f"+sweep.job={label}")


def _launch(jobs: list[list[str]], config: DictConfig, context: HydraContext) -> None:
    launcher = Plugins.instance().instantiate_launcher(config=config, hydra_context=context, task_function=run_job)
    try:
        with _ending_on_sigterm():
            launcher.launch(jobs, initial_job_idx=0)
    except Exception as error:  # what its scheduler raises, such as for a job that was lost; the others are not
        _log.error("the launcher ended early: %s", " ".join(f"{type(error).__name__}: {error}".split()))
        _log.debug("where it ended", exc_info=True)


@contextmanager
def _ending_on_sigterm() -> Iterator[None]:
    """Let a launcher take its processes along: joblib's would finish their runs without anyone to see it."""

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _ending(job: Job, metric: str) -> Ending:
    content = content_of(job.directory)
    status = content.get("status")
    if status == FINISHED:
        return Ending(job=job, status=status, value=content["summary"].get(metric), error=())
    return Ending(job=job, status=status, value=None, error=last_lines(job.directory))
