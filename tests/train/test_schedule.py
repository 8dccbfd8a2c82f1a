"""Learning rates by step, and budgets in every unit."""

from __future__ import annotations

import math

import pytest

from upcycle.errors import ConfigError
from upcycle.train.config import BudgetConfig, ScheduleConfig
from upcycle.train.schedule import budget_steps, check_schedule, learning_rate


def budget(**given: float) -> BudgetConfig:
    return BudgetConfig(**{"steps": None, "tokens": None, "flops": None, **given})  # type: ignore[arg-type]


def rates(schedule: ScheduleConfig, steps: int) -> list[float]:
    return [learning_rate(schedule, step, steps=steps, tokens_per_step=100) for step in range(steps)]


@pytest.mark.parametrize(
    ("given", "steps"), [({"steps": 7}, 7), ({"tokens": 1e3}, 10), ({"tokens": 1049}, 10), ({"flops": 5e6}, 5)]
)
def test_a_budget_in_every_unit(given: dict[str, float], steps: int) -> None:
    assert budget_steps(budget(**given), tokens_per_step=100, flops_per_step=10**6) == steps


@pytest.mark.parametrize(
    ("given", "says"),
    [({}, "none"), ({"steps": 1, "flops": 1}, "steps, budget.flops"), ({"tokens": 3}, "less than one step")],
)
def test_a_budget_that_is_none(given: dict[str, float], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        budget_steps(budget(**given), tokens_per_step=100, flops_per_step=10**6)


def test_iso_flop_arms_spend_the_same_within_half_a_step() -> None:
    flops = 1e12
    for per_step in (3_456_789_123, 7_654_321_987):
        steps = budget_steps(budget(flops=flops), tokens_per_step=1, flops_per_step=per_step)
        assert abs(steps * per_step - flops) <= per_step / 2


def test_cosine() -> None:
    found = rates(ScheduleConfig(name="cosine", peak=1.0, final=0.1, warmup=4), 24)
    assert found[:4] == [0.25, 0.5, 0.75, 1.0]
    assert found[4] == 1.0
    assert found[14] == pytest.approx(0.55)
    assert found[23] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 19 / 20)) / 2)


def test_warmup_as_a_share_of_the_budget() -> None:
    assert rates(ScheduleConfig(name="constant", peak=1.0, warmup=0.1), 20) == [0.5] + [1.0] * 19


def test_wsd() -> None:
    found = rates(ScheduleConfig(name="wsd", peak=1.0, final=0.5, warmup=0, decay=4), 10)
    assert found[:7] == [1.0] * 7
    assert found[7:] == [0.875, 0.75, 0.625]


@pytest.mark.parametrize("length", [{"steps": 5}, {"tokens": 500}])
def test_reset_stays_at_final(length: dict[str, int]) -> None:
    found = rates(ScheduleConfig(name="reset", peak=1.0, final=0.2, warmup=0, **length), 8)
    assert found[0] == 1.0
    assert found[5:] == pytest.approx([0.2] * 3)
    assert found[1:5] == sorted(found[1:5], reverse=True)


def test_reset_without_a_length_is_a_cosine() -> None:
    fields = {"peak": 1.0, "final": 0.2, "warmup": 3}
    assert rates(ScheduleConfig(name="reset", **fields), 9) == rates(ScheduleConfig(name="cosine", **fields), 9)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"peak": 0.0}, "peak"),
        ({"final": 2.0}, "final"),
        ({"warmup": 11}, "warmup"),
        ({"decay": 11}, "decay"),
        ({"steps": 0}, "steps"),
        ({"steps": 1, "tokens": 1.0}, "two lengths"),
    ],
)
def test_a_schedule_that_cannot_be(fields: dict[str, float], named: str) -> None:
    schedule = ScheduleConfig(**{"name": "wsd", "peak": 1.0, "warmup": 0, **fields})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=named):
        check_schedule(schedule, steps=10)
