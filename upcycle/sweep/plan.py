"""A sweep, checked: every arm composed, validated and counted before the first of its runs starts."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from hydra import compose
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from upcycle.arguments import ARM, readable, typed_options
from upcycle.errors import ConfigError, UpcycleError, near_misses
from upcycle.sweep.check import Estimate, estimate
from upcycle.sweep.config import SweepConfig
from upcycle.sweep.expand import Arm, expand
from upcycle.tracking.record import NOT_COMPARED
from upcycle.tracking.schema import METRICS
from upcycle.train.config import TrainConfig

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from omegaconf import DictConfig

HASH_LENGTH = 12  # hexadecimal digits, in names of directories
COMMAND = "train"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of a sweep.

    Attributes:
        arm: name of its arm.
        seed: its seed.
        directory: of the run, named by a hash of its options.
        overrides: what makes it out of the sweep's own command line, in Hydra's grammar.
    """

    arm: str
    seed: int
    directory: Path
    overrides: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """A sweep that may start.

    Attributes:
        name: of its file.
        sweep: its options.
        arms: the arms.
        seeds: with which each arm runs.
        estimates: what one run of each arm takes, by name.
        jobs: every run: all arms with the first seed, then with the next one, so that what an interrupted sweep leaves
            is paired.
    """

    name: str
    sweep: SweepConfig
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    estimates: Mapping[str, Estimate]
    jobs: tuple[Job, ...]

    @property
    def flops(self) -> int:
        return sum(self.estimates[job.arm].flops for job in self.jobs)

    @property
    def disk(self) -> int:
        return sum(self.estimates[job.arm].disk for job in self.jobs)


def plan_sweep(composed: DictConfig, *, name: str, overrides: Sequence[str], output: Path, execute: bool) -> SweepPlan:
    """Expand and check a sweep. Hydra has to be initialised: every arm is composed.

    Args:
        composed: the baseline, with `sweep`.
        name: of the sweep's file.
        overrides: the command line that composed it.
        output: directory of all runs.
        execute: whether the sweep will run: weights of sources must be there.

    Returns:
        The sweep; with `arm` in `composed` that arm alone, with the seed that `composed` has.

    Raises:
        ConfigError: the sweep is not valid, has no such arm, arms are not (all are listed), or two arms are the same.
    """
    sweep = _sweep_options(composed)
    arms, seeds = expand(sweep), tuple(sweep.seeds)
    if ARM in composed:
        arms, seeds = (_named(str(composed[ARM]), arms),), (composed.seed,)
    configs, estimates, errors = dict[str, TrainConfig](), dict[str, Estimate](), dict[str, str]()
    for arm in arms:
        try:
            given = [*overrides, *arm.overrides, "output=''"]
            configs[arm.name] = typed_options(TrainConfig, compose(COMMAND, overrides=given))
            estimates[arm.name] = estimate(configs[arm.name], execute=execute)
        except (UpcycleError, HydraException, OmegaConfBaseException, OSError) as error:
            errors[arm.name] = readable(error, COMMAND)
    if errors:
        found = "".join(f"\n  {arm}: " + error.replace("\n", "\n  ") for arm, error in errors.items())
        raise ConfigError(f"{len(errors)} of {len(arms)} arms are not valid, and nothing was started", found=found)
    _check_different(configs)
    jobs = tuple(_job(arm, configs[arm.name], seed, output) for seed in seeds for arm in arms)
    return SweepPlan(name=name, sweep=sweep, arms=arms, seeds=seeds, estimates=estimates, jobs=jobs)


def config_hash(config: TrainConfig) -> str:
    """SHA-256 of the options that can change a number in a run, the seed among them."""
    compared = {key: value for key, value in asdict(config).items() if key not in NOT_COMPARED}
    return hashlib.sha256(json.dumps(compared, sort_keys=True).encode()).hexdigest()


def _sweep_options(composed: DictConfig) -> SweepConfig:
    if "seeds" not in composed.sweep:
        raise ConfigError("a sweep needs a scale", found="scale=null", expected="scale=smoke, laptop, smollm2 or paper")
    # The values of arms may refer to the baseline, such as `${schedule.final}`, so this is resolved as a whole.
    plain: Any = OmegaConf.to_container(composed.sweep, resolve=True, throw_on_missing=True)
    sweep: SweepConfig = typed_options(SweepConfig, OmegaConf.create(plain))
    if sweep.metric not in {metric.name for metric in METRICS}:
        raise ConfigError("sweep.metric is not a metric", found=sweep.metric, expected="a name of tracking/schema.py")
    return sweep


def _named(name: str, arms: Sequence[Arm]) -> Arm:
    known = {arm.name: arm for arm in arms}
    if name not in known:
        raise ConfigError("the sweep has no such arm", found=name, expected=near_misses(name, known))
    return known[name]


def _check_different(configs: Mapping[str, TrainConfig]) -> None:
    same = defaultdict(list)
    for name, config in configs.items():
        same[config_hash(config)].append(name)
    repeated = [" = ".join(names) for names in same.values() if len(names) > 1]
    if repeated:
        raise ConfigError(
            "arms are identical: they compose to the same options",
            found="; ".join(repeated),
            remedy="leave one out, or look for a value that is the baseline's",
        )


def _job(arm: Arm, config: TrainConfig, seed: int, output: Path) -> Job:
    directory = output / config_hash(replace(config, seed=seed))[:HASH_LENGTH]
    return Job(arm=arm.name, seed=seed, directory=directory, overrides=(*arm.overrides, f"seed={seed}"))
