"""Layouts: what is left open is filled in, and what cannot be is refused with what can."""

from __future__ import annotations

from typing import Any

import pytest

from upcycle.distributed.layout import Layout, check_experts, check_heads, resolve
from upcycle.errors import ConfigError
from upcycle.parallel.config import ParallelConfig


def config(**changes: Any) -> ParallelConfig:
    return ParallelConfig(**{"fsdp": None, "tp": 1, "ep": 1, "replicate": 1, **changes})


@pytest.mark.parametrize(
    ("given", "ranks", "expected"),
    [
        ({}, 4, Layout(fsdp=4)),
        ({"ep": None}, 4, Layout(fsdp=4, ep=4)),
        ({"ep": None, "tp": 2}, 4, Layout(fsdp=2, tp=2, ep=4)),
        ({"ep": None, "replicate": 2}, 8, Layout(replicate=2, fsdp=4, ep=4)),
        ({"ep": 2, "replicate": 2}, 8, Layout(replicate=2, fsdp=4, ep=2)),
        ({"fsdp": 2, "tp": 2}, 4, Layout(fsdp=2, tp=2)),
    ],
)
def test_filled_in(given: dict[str, Any], ranks: int, expected: Layout) -> None:
    found = resolve(config(**given), ranks)
    assert found == expected
    assert found.ranks == ranks


@pytest.mark.parametrize(
    ("given", "ranks", "message"),
    [
        ({"tp": 2}, 5, r"5 ranks for replicate=1, fsdp=None, tp=2\n.*4 or 6 ranks"),
        ({"replicate": 4}, 3, r"expected: 4 ranks"),
        ({"fsdp": 4, "tp": 2}, 4, r"expected: 8 ranks"),
        ({"ep": 3}, 4, r"ep=3 of fsdp \* tp = 4 ranks(.|\n)*parallel.ep=4"),
        ({"ep": 2, "tp": 4}, 8, r"a multiple of tp that divides fsdp \* tp"),
        ({"tp": 0}, 4, r"parallel.tp is out of range"),
    ],
)
def test_refused(given: dict[str, Any], ranks: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(config(**given), ranks)


@pytest.mark.parametrize(
    ("layout", "experts", "message"),
    [
        (Layout(fsdp=2, tp=2), 8, r"tensor parallelism does not split experts(.|\n)*parallel.ep=4"),
        (Layout(fsdp=4, ep=4), 6, r"ep=4, 6 experts\n.*1, 2\n.*parallel.ep=2"),
        (Layout(fsdp=8, ep=1), 4, r"fsdp \* tp = 8, 4 experts(.|\n)*parallel.replicate=2"),
    ],
)
def test_experts_that_cannot_be_laid_out(layout: Layout, experts: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_experts(layout, experts)


def test_heads_that_cannot_be_split() -> None:
    check_heads(Layout(fsdp=2, tp=2), 4)
    with pytest.raises(ConfigError, match="tp=2, 3 heads"):
        check_heads(Layout(fsdp=2, tp=2), 3)


def test_experts_that_can() -> None:
    check_experts(Layout(fsdp=2, tp=2, ep=4), 8)
    check_experts(Layout(), 1)
