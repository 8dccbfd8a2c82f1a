"""What `upcycle plan-sweep` and `upcycle train -m +sweeps=NAME` print and return."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from rich.console import Console

from upcycle.convert.prepare import free_bytes
from upcycle.errors import ConfigError, OutputError
from upcycle.files.durable import write_text
from upcycle.models.source import expanded
from upcycle.sweep.agent import agent_config
from upcycle.sweep.plan import SweepPlan, plan_sweep
from upcycle.sweep.render import endings_table, plan_table, unfinished
from upcycle.sweep.run import endings, ranks_of_a_run, run_sweep

if TYPE_CHECKING:
    from pathlib import Path

    from omegaconf import DictConfig

GROUP = "sweeps"


def sweep_name() -> str:
    """Name of the sweep on the command line.

    Raises:
        ConfigError: there is none.
    """
    choices = HydraConfig.get().runtime.choices
    if GROUP not in choices:
        raise ConfigError("there is no sweep", found="nothing", expected="+sweeps=NAME", remedy="add +sweeps=NAME")
    return str(choices[GROUP])


def show(composed: DictConfig) -> int:
    """`upcycle plan-sweep`: what a sweep would run and cost, or everything that is wrong with it; 1 on a full disk."""
    if composed.agent:
        _check_output(composed)
    output = expanded("." if OmegaConf.is_missing(composed, "output") else composed.output)
    plan = _plan(composed, output, execute=False)
    free = free_bytes(output)
    Console().print(plan_table(plan, free=free))
    if composed.agent:
        config = agent_config(
            plan,
            output=output,
            overrides=_overrides(),
            flags=_flags(),
            project=composed.wandb.project,
            entity=composed.wandb.entity,
        )
        write_text(expanded(composed.agent), OmegaConf.to_yaml(OmegaConf.create(config)))
        print(f"wrote {composed.agent}\nnext: wandb sweep {composed.agent}")
    return 1 if plan.disk(plan.left) > free else 0


def train(composed: DictConfig) -> int:
    """`upcycle train -m +sweeps=NAME`: run what has not finished, then list all; 1 if a run did not finish.

    With `+arm=NAME seed=N` instead of `-m`, that one run.

    Raises:
        ConfigError: the sweep is not valid, or has no output.
        OutputError: the disk has too little space, or the output cannot be written.
    """
    _check_output(composed)
    output = expanded(composed.output)
    plan = _plan(composed, output, execute=True)
    free = free_bytes(output)
    Console(stderr=True).print(plan_table(plan, free=free))
    _check_space(plan, output, free)
    run_sweep(plan, output=output, overrides=_overrides(), launcher=HydraConfig.get().overrides.hydra)
    ended = endings(plan)
    Console().print(endings_table(plan, ended))
    left = unfinished(ended)
    if left:
        print(left)
    return 1 if left else 0


def _plan(composed: DictConfig, output: Path, *, execute: bool) -> SweepPlan:
    return plan_sweep(
        composed, name=sweep_name(), overrides=_overrides(), output=output, ranks=ranks_of_a_run(), execute=execute
    )


def _check_output(composed: DictConfig) -> None:
    if OmegaConf.is_missing(composed, "output"):
        raise ConfigError("a required option is missing", found="nothing", expected="output=…", remedy="add output=DIR")


def _check_space(plan: SweepPlan, output: Path, free: int) -> None:
    needed = plan.disk(plan.left)
    if needed > free:
        raise OutputError(
            "there is too little space for the checkpoints, and nothing was started",
            found=f"{free / 1e9:.2f} GB free at {output}",
            expected=f"{needed / 1e9:.2f} GB for {len(plan.left)} runs",
            remedy="make space, choose another output, or take fewer sweep.seeds",
        )


def _overrides() -> list[str]:
    """The command line, without what is not for its runs."""
    return [each for each in HydraConfig.get().overrides.task if not each.startswith("agent=")]


def _flags() -> list[str]:
    """Hydra's flag for the directory of the user's own sweeps."""
    sources = HydraConfig.get().runtime.config_sources
    return [f"--config-dir={each.path}" for each in sources if each.provider == "command-line"]
