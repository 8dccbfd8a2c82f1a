"""From a sweep's options to its arms."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from upcycle.errors import ConfigError
from upcycle.sweep.config import SweepConfig
from upcycle.sweep.expand import expand, literal

EMPTY = SweepConfig(
    question="?", hypothesis="!", metric="val/loss", published="none", seeds=[0], retries=0, flops_per_second=1.0
)


def arms(**options: Any) -> dict[str, list[str]]:
    return {arm.name: list(arm.overrides) for arm in expand(replace(EMPTY, **options))}


def test_one_factor_at_a_time_starts_with_the_baseline() -> None:
    assert arms(vary={"moe.expansion": [2, 4], "balance.aux_loss": [0.0]}) == {
        "baseline": [],
        "expansion=2": ["moe.expansion=2"],
        "expansion=4": ["moe.expansion=4"],
        "aux_loss=0": ["balance.aux_loss=0.0"],
    }


def test_a_grid_has_every_combination() -> None:
    made = arms(grid={"moe.expansion": [2, 4], "moe.granularity": [1, 2], "moe.top_k": [2]})
    assert len(made) == 4
    assert made["expansion=4 granularity=1 top_k=2"] == ["moe.expansion=4", "moe.granularity=1", "moe.top_k=2"]


def test_zipped_values_go_together() -> None:
    assert list(arms(zip={"moe.granularity": [1, 2], "moe.top_k": [1, 2]})) == [
        "granularity=1 top_k=1",
        "granularity=2 top_k=2",
    ]


def test_named_arms_and_all_forms_together() -> None:
    made = arms(vary={"seed": [1]}, grid={"a": [1]}, zip={"b": [1]}, arms={"mine": ["init=drop", "seed=2"]})
    assert list(made) == ["baseline", "seed=1", "a=1", "b=1", "mine"]
    assert made["mine"] == ["init=drop", "seed=2"]


def test_ambiguous_options_are_named_in_full() -> None:
    assert list(arms(grid={"schedule.steps": [1], "budget.steps": [2], "seed": [0]})) == [
        "schedule.steps=1 budget.steps=2 seed=0"
    ]


@pytest.mark.parametrize(
    "value",
    [None, True, 3, -1, 0.5, 1e-8, "copy", "every_2", "a b=c", "it's", [0, 1], {"start": 0.1, "end": 0, "steps": 5}],
)
def test_literals_come_back_from_hydras_grammar(value: object) -> None:
    parsed = OverridesParser.create().parse_override(f"key={literal(value)}").value()
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "no arms"),
        ({"vary": {"seed": []}}, "without values"),
        ({"zip": {"a": [1], "b": [1, 2]}}, "a: 1, b: 2"),
        ({"vary": {"a": [1]}, "grid": {"a": [1]}}, "same name"),
        ({"vary": {"a": [1]}, "seeds": []}, "seeds"),
        ({"vary": {"a": [1]}, "seeds": [1, 1]}, "seeds"),
        ({"vary": {"a": [1]}, "retries": -1}, r"sweep\.retries"),
        ({"vary": {"a": [1]}, "flops_per_second": 0}, r"sweep\.flops_per_second"),
    ],
)
def test_sweeps_that_cannot_be(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        arms(**options)
