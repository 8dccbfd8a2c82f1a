"""Ratios of measured sums: what is said where what is below the line is zero."""

from __future__ import annotations

import math

import pytest

from upcycle.evaluation.losses import perplexity
from upcycle.routing.ratios import ratio


@pytest.mark.parametrize(
    ("part", "whole", "expected"),
    [
        (1.0, 2.0, 0.5),
        (0.0, 2.0, 0.0),
        (0.0, 0.0, 0.0),
        (1.0, 0.0, None),
        (math.nan, 0.0, None),
        (math.nan, 1.0, None),
        (math.inf, 1.0, None),
        (1.0, math.nan, None),
        (1e300, 1e-300, None),
    ],
)
def test_ratio(part: float, whole: float, expected: float | None) -> None:
    assert ratio(part, whole) == expected


def test_perplexity_beyond_what_a_number_can_say() -> None:
    assert perplexity(1.0) == math.e
    assert perplexity(1000.0) == math.inf
    assert math.isnan(perplexity(math.nan))
