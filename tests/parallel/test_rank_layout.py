"""Layouts: what is left open is filled in, and what cannot be is refused with the nearest that can."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from upcycle.errors import ConfigError
from upcycle.parallel.config import ParallelConfig
from upcycle.parallel.rank_layout import RankLayout, check_experts, check_heads, divisors, rank_layouts, resolve

if TYPE_CHECKING:
    from collections.abc import Callable


def config(**changes: Any) -> ParallelConfig:
    return ParallelConfig(**{"fsdp": None, "tp": None, "ep": 1, "replicate": None, **changes})


@pytest.mark.parametrize(
    ("given", "ranks", "expected"),
    [
        ({}, 4, RankLayout(fsdp=4)),
        ({"ep": None}, 4, RankLayout(fsdp=4, ep=4)),
        ({"ep": None, "tp": 2}, 4, RankLayout(fsdp=2, tp=2, ep=4)),
        ({"ep": None, "replicate": 2}, 8, RankLayout(replicate=2, fsdp=4, ep=4)),
        ({"ep": 2, "replicate": 2}, 8, RankLayout(replicate=2, fsdp=4, ep=2)),
        ({"fsdp": 2, "tp": 2}, 4, RankLayout(fsdp=2, tp=2)),
    ],
)
def test_filled_in(given: dict[str, Any], ranks: int, expected: RankLayout) -> None:
    found = resolve(config(**given), ranks)
    assert found == expected
    assert found.ranks == ranks


@pytest.mark.parametrize(
    ("given", "ranks", "message"),
    [
        ({"tp": 2}, 5, r"5 ranks for replicate=1, fsdp=None, tp=2\n.*4 or 6 ranks\n.*set parallel.tp=1$"),
        ({"replicate": 4}, 3, r"expected: 4 ranks\n.*set parallel.replicate=3$"),
        ({"fsdp": 4, "tp": 2}, 4, r"expected: 8 ranks\n.*set parallel.fsdp=2$"),
        ({"ep": 3}, 4, r"ep=3 of fsdp \* tp = 4 ranks(.|\n)*set parallel.ep=4$"),
        ({"ep": 2, "tp": 4}, 8, r"a multiple of tp that divides fsdp \* tp\n.*set parallel.ep=4$"),
        ({"tp": 0}, 4, r"parallel.tp is out of range"),
        ({"replicate": 0}, 4, r"parallel.replicate is out of range"),
    ],
)
def test_refused(given: dict[str, Any], ranks: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(config(**given), ranks)


@pytest.mark.parametrize(
    ("layout", "experts", "message"),
    [
        (RankLayout(fsdp=2, tp=2), 8, r"tensor parallelism does not split experts(.|\n)*set parallel.ep=2$"),
        (RankLayout(fsdp=4, ep=4), 6, r"ep=4, 6 experts\n.*a divisor of 6\n.*set parallel.ep=2$"),
        (RankLayout(fsdp=8, ep=1), 4, r"fsdp \* tp = 8, 4 experts(.|\n)*set parallel.replicate=2 parallel.fsdp=4$"),
        (RankLayout(fsdp=10, ep=10), 4, r"set parallel.replicate=5 parallel.fsdp=2 parallel.ep=2$"),
        (RankLayout(fsdp=128, ep=128), 60, r"set parallel.replicate=4 parallel.fsdp=32 parallel.ep=4$"),
        (RankLayout(fsdp=12, ep=12), 8, r"set parallel.replicate=2 parallel.fsdp=6 parallel.ep=2$"),
        (RankLayout(fsdp=2, tp=4, ep=4), 6, r"set parallel.replicate=2 parallel.tp=2 parallel.ep=2$"),
    ],
)
def test_experts_that_cannot_be_laid_out(layout: RankLayout, experts: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_experts(layout, experts)


def test_heads_that_cannot_be_split() -> None:
    check_heads(RankLayout(fsdp=2, tp=2), 4)
    with pytest.raises(ConfigError, match=r"tp=2, 3 heads(.|\n)*set parallel.fsdp=4 parallel.tp=1$"):
        check_heads(RankLayout(fsdp=2, tp=2), 3)


def test_experts_that_can() -> None:
    check_experts(RankLayout(fsdp=2, tp=2, ep=4), 8)
    check_experts(RankLayout(), 1)


def test_divisors() -> None:
    assert divisors(56) == [1, 2, 4, 7, 8, 14, 28, 56]


def followed(asked: ParallelConfig, error: ConfigError) -> ParallelConfig:
    """The options after what the error says was done."""
    changes = re.findall(r"parallel\.(\w+)=(\d+)", str(error).split("remedy:")[1])
    assert changes, error
    return replace(asked, **{name: int(size) for name, size in changes})


SIZES = st.integers(1, 24)
OPTIONAL = st.none() | SIZES


@given(
    asked=st.builds(ParallelConfig, fsdp=OPTIONAL, tp=OPTIONAL, ep=OPTIONAL, replicate=OPTIONAL),
    ranks=st.integers(1, 128),
    experts=st.integers(1, 128),
    heads=st.integers(1, 16),
)
@example(asked=config(ep=None), ranks=10, experts=4, heads=1)
@example(asked=config(ep=None), ranks=128, experts=60, heads=1)
@example(asked=config(ep=None), ranks=12, experts=8, heads=1)
@example(asked=config(tp=4, ep=None), ranks=16, experts=6, heads=8)
def test_what_is_suggested_is_accepted(asked: ParallelConfig, ranks: int, experts: int, heads: int) -> None:
    """Each check takes what it suggested, and what it suggested passes those before it."""
    checks = [
        lambda _layout: None,
        lambda layout: check_experts(layout, experts),
        lambda layout: check_heads(layout, heads, experts),
    ]
    for count in range(1, len(checks) + 1):
        try:
            laid_out(asked, ranks, checks[:count])
        except ConfigError as error:
            asked = followed(asked, error)
            laid_out(asked, ranks, checks[:count])
    assert resolve(asked, ranks) in list(rank_layouts(ranks, experts=experts, heads=heads))


def laid_out(asked: ParallelConfig, ranks: int, checks: list[Callable[[RankLayout], None]]) -> None:
    layout = resolve(asked, ranks)
    for check in checks:
        check(layout)
