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

from upcycle.errors import ConfigError, UpcycleError, near_misses
from upcycle.options.arguments import ARM, readable, typed_options
from upcycle.sweep.check import Estimate, estimate
from upcycle.sweep.config import SweepConfig
from upcycle.sweep.expand import Arm, expand
from upcycle.sweep.job import status_of
from upcycle.tracking.record import CHECKPOINTS, NOT_COMPARED
from upcycle.tracking.schema import METRICS
from upcycle.tracking.status import FINISHED
from upcycle.tracking.versions import recorded
from upcycle.train.config import TrainConfig

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
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
    def left(self) -> tuple[Job, ...]:
        """The runs that have not finished, as their directories or packs say now."""
        return tuple(job for job in self.jobs if status_of(job.directory) != FINISHED)

    def flops(self, jobs: Iterable[Job]) -> int:
        """Training FLOPs of runs from their start."""
        return sum(self.estimates[job.arm].flops for job in jobs)

    def seconds(self, jobs: Iterable[Job]) -> float:
        """Of runs from their start, one after the other, at the speed that the scale assumes."""
        return self.flops(jobs) / self.sweep.flops_per_second

    def disk(self, jobs: Iterable[Job]) -> int:
        """Bytes that the checkpoints of runs will take beyond what they take now."""
        return sum(max(0, self.estimates[job.arm].disk - _taken(job)) for job in jobs)


def plan_sweep(
    composed: DictConfig, *, name: str, overrides: Sequence[str], output: Path, ranks: int | None, execute: bool
) -> SweepPlan:
    """Expand and check a sweep. Hydra has to be initialised: every arm is composed.

    Args:
        composed: the baseline, with `sweep`.
        name: of the sweep's file.
        overrides: the command line that composed it.
        output: directory of all runs.
        ranks: processes that train a run together; None checks no layout.
        execute: whether the sweep will run: weights of sources must be there.

    Returns:
        The sweep; with `arm` in `composed` that arm alone, with the seed that `composed` has.

    Raises:
        ConfigError: the sweep is not valid, has no such arm, arms are not (all are listed), or two arms are the same.
    """
    sweep = sweep_options(composed)
    arms, seeds = expand(sweep), tuple(sweep.seeds)
    if ARM in composed:
        arms, seeds = (_named(str(composed[ARM]), arms),), (composed.seed,)
    configs, estimates, errors = dict[str, TrainConfig](), dict[str, Estimate](), dict[str, str]()
    for arm in arms:
        try:
            configs[arm.name] = arm_config(arm, overrides, seed=composed.seed)
            estimates[arm.name] = estimate(configs[arm.name], ranks=ranks, execute=execute)
        except (UpcycleError, HydraException, OmegaConfBaseException, OSError) as error:
            errors[arm.name] = readable(error, COMMAND)
    if errors:
        found = "".join(f"\n  {arm}: " + error.replace("\n", "\n  ") for arm, error in errors.items())
        raise ConfigError(f"{len(errors)} of {len(arms)} arms are not valid, and nothing was started", found=found)
    _check_different(configs)
    jobs = tuple(
        Job(
            arm=arm.name,
            seed=seed,
            directory=output / directory_name(configs[arm.name], seed),
            overrides=(*arm.overrides, f"seed={seed}"),
        )
        for seed in seeds
        for arm in arms
    )
    return SweepPlan(name=name, sweep=sweep, arms=arms, seeds=seeds, estimates=estimates, jobs=jobs)


def arm_config(arm: Arm, overrides: Sequence[str], *, seed: int) -> TrainConfig:
    """The options of an arm's runs, but for output and seed.

    Args:
        arm: the arm.
        overrides: the sweep's command line.
        seed: the one that this gives.

    Raises:
        ConfigError: an option is not valid, or the arm sets the seed.
        HydraException: an override cannot be composed.
    """
    config: TrainConfig = typed_options(TrainConfig, compose(COMMAND, [*overrides, *arm.overrides, "output=''"]))
    if config.seed != seed:
        raise ConfigError(
            "an arm sets the seed, and every arm runs with each of sweep.seeds",
            found=f"seed={config.seed}",
            remedy="leave it out of the arm; sweep.seeds=[0,1,2] says which seeds",
        )
    return config


def directory_name(config: TrainConfig, seed: int) -> str:
    """Name of the directory of an arm's run."""
    return config_hash(replace(config, seed=seed))[:HASH_LENGTH]


def config_hash(config: TrainConfig) -> str:
    """SHA-256 of the options that can change a number in a run, the seed among them."""
    compared = {key: value for key, value in recorded(asdict(config)).items() if key not in NOT_COMPARED}
    return hashlib.sha256(json.dumps(compared, sort_keys=True).encode()).hexdigest()


def sweep_options(composed: DictConfig) -> SweepConfig:
    """The checked options `sweep.*` of a composed config.

    Raises:
        ConfigError: there is no scale, or an option is not valid.
    """
    if "seeds" not in composed.sweep:
        raise ConfigError("a sweep needs a scale", found="scale=null", expected="scale=smoke, laptop, smollm2 or paper")
    # The values of arms may refer to the baseline, such as `${schedule.final}`, so this is resolved as a whole.
    plain: Any = OmegaConf.to_container(composed.sweep, resolve=True, throw_on_missing=True)
    sweep: SweepConfig = typed_options(SweepConfig, OmegaConf.create(plain))
    if sweep.metric not in {metric.name for metric in METRICS}:
        raise ConfigError("sweep.metric is not a metric", found=sweep.metric, expected="a name of tracking/schema.py")
    return sweep


def _taken(job: Job) -> int:
    files = (file for file in (job.directory / CHECKPOINTS).rglob("*") if file.is_file() and not file.is_symlink())
    return sum(file.stat().st_size for file in files)


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
