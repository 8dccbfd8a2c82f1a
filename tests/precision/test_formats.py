"""Numbers of few bits: which there are, what rounds to them, and that rounding by chance has the right mean."""

from __future__ import annotations

import pytest
import torch

from upcycle.precision.formats import E2M1, E4M3, E5M2, Format, nearest, spacing, stochastic

FORMATS = [E2M1, E4M3, E5M2]
FOUR_BITS = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
MEANS = 4096


def numbers(format: Format) -> torch.Tensor:
    """All finite numbers of a format that are not negative, ascending."""
    if format.dtype is None:
        return torch.tensor(FOUR_BITS)
    every = torch.arange(128, dtype=torch.uint8).view(format.dtype).float()
    return every[every.isfinite()]


@pytest.mark.parametrize("format", FORMATS, ids=lambda each: each.name)
def test_numbers_stay(format: Format) -> None:
    there = numbers(format)
    assert there.max() == format.largest
    assert torch.equal(nearest(there, format), there)
    assert torch.equal(nearest(-there, format), -there)


@pytest.mark.parametrize("format", FORMATS, ids=lambda each: each.name)
def test_the_nearest_and_of_two_the_even_one(format: Format) -> None:
    there = numbers(format)
    middle = (there[:-1] + there[1:]) / 2
    even = torch.where(torch.arange(len(middle)) % 2 == 0, there[:-1], there[1:])
    assert torch.equal(nearest(middle, format), even)
    assert torch.equal(nearest(middle * (1 - 1e-6), format), there[:-1])
    assert torch.equal(nearest(middle * (1 + 1e-6), format), there[1:])
    assert torch.equal(nearest(torch.tensor([1e9, -1e9, torch.inf]), format), format.largest * torch.tensor([1, -1, 1]))


@pytest.mark.parametrize("format", FORMATS, ids=lambda each: each.name)
def test_conversions_of_torch_are_the_same_rounding(format: Format) -> None:
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * format.largest / 3
    limited = x.clamp(-format.largest, format.largest)
    step = spacing(limited, format)
    assert torch.equal(nearest(x, format), (limited / step).round() * step)


@pytest.mark.parametrize("format", FORMATS, ids=lambda each: each.name)
def test_rounding_by_chance_gives_neighbours_whose_mean_is_the_number(format: Format) -> None:
    """The mean of many is within five standard errors, and rounding to the nearest is further away."""
    there = numbers(format)[:-1]
    there = there[there < 8]
    gap = numbers(format)[1 : len(there) + 1] - there
    x = there + 0.3 * gap
    rounded = stochastic(x.expand(MEANS, -1), format, values=torch.Generator().manual_seed(0))
    assert ((rounded == there) | (rounded == there + gap)).all()
    error = 5 * gap * (0.3 * 0.7 / MEANS) ** 0.5
    assert ((rounded.mean(0) - x).abs() <= error).all()
    assert ((nearest(x, format) - x).abs() > error).all()


def test_the_same_numbers_for_the_same_generator() -> None:
    x = torch.randn(100)
    one, again, other = (stochastic(x, E2M1, values=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
