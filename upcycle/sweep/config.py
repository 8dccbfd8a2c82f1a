"""Options `sweep.*`, the question that a file of `sweeps/` asks and how its runs are made; and of `upcycle pack`.

Knows no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from upcycle.options.config import STRICT


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """`sweep.*`: a sweep file gives question and arms, a file of `conf/scale` the rest.

    The arms are those of `vary`, `grid`, `zip` and `arms` together; options outside `sweep` are the baseline.

    Attributes:
        question: what is asked.
        hypothesis: the answer that is expected.
        metric: name in `upcycle.tracking.schema` of what is compared.
        published: outcomes in the literature, with their sources.
        vary: one factor at a time: option -> values, each an arm that differs from the baseline in it alone. The
            baseline is an arm too.
        grid: option -> values: every combination is an arm.
        zip: option -> values: the first values of all are an arm, the second ones, and so on.
        arms: name -> overrides.
        seeds: every arm runs with each of them, so that arms are paired by seed.
        retries: how often a run that failed is tried again.
        flops_per_second: training FLOP/s of the device that the scale is meant for, to estimate times.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    question: str
    hypothesis: str
    metric: str
    published: str
    vary: dict[str, list[Any]] = field(default_factory=dict)
    grid: dict[str, list[Any]] = field(default_factory=dict)
    zip: dict[str, list[Any]] = field(default_factory=dict)
    arms: dict[str, list[str]] = field(default_factory=dict)
    seeds: list[int]
    retries: int
    flops_per_second: float


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    """`upcycle pack`.

    Attributes:
        runs: the output of sweeps.
        name: of one of them; null packs all.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    runs: str
    name: str | None
