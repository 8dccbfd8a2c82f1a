"""Scales: each element's error is bounded, powers of two change no number, zeros and empty matrices survive."""

from __future__ import annotations

import pytest
import torch

from upcycle.precision.quantise import quantise
from upcycle.precision.recipes import RECIPES
from upcycle.precision.rotation import matrix, rotate

SCALINGS = {
    f"{name} {part}": getattr(recipe, part)
    for name, recipe in RECIPES.items()
    for part in ("activation", "weight", "gradient")
}
# Half of the distance of two numbers over the smaller, at the worst; NVFP4's scale in E4M3 cuts off as much again.
WORST = {
    "bf16": 2**-8,
    "fp8_current": 2**-3,
    "fp8_current_e4m3": 2**-4,
    "fp8_block": 2**-4,
    "mxfp8": 2**-4,
    "nvfp4": 0.34,
}


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", SCALINGS)
def test_errors_are_bounded(name: str) -> None:
    """Relative for what is not among the smallest of its block."""
    x = values(128, 256)
    error = (quantise(x, SCALINGS[name]).values_RC() - x).abs()
    large = x.abs() > 1.0
    assert (error[large] / x[large].abs()).max() <= WORST[name.split()[0]]
    assert (error > 0).any()


@pytest.mark.parametrize("power", [2.0, 8.0, 64.0, 2.0**-5])
@pytest.mark.parametrize("name", SCALINGS)
def test_a_power_of_two_changes_no_number(name: str, power: float) -> None:
    """So the exact scaling of an upcycled model costs nothing in low precision."""
    x = values(64, 256)
    one, other = quantise(x, SCALINGS[name]), quantise(x * power, SCALINGS[name])
    if SCALINGS[name].scale != "none":
        assert torch.equal(one.numbers_RC, other.numbers_RC)
    assert torch.equal(one.values_RC() * power, other.values_RC())


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("shape", [(0, 64), (64, 0), (1, 1), (17, 130)])
def test_any_shape(name: str, shape: tuple[int, int]) -> None:
    """What a block lacks of its size is as zeros, and is not there afterwards."""
    x = values(*shape)
    written = quantise(x, SCALINGS[name])
    assert written.values_RC().shape == shape
    wider = torch.nn.functional.pad(x, (0, 256 - shape[1], 0, 128 - shape[0]))
    if x.numel():
        assert torch.equal(quantise(wider, SCALINGS[name]).values_RC()[: shape[0], : shape[1]], written.values_RC())


@pytest.mark.parametrize("name", SCALINGS)
def test_zeros_stay(name: str) -> None:
    x = values(32, 64)
    x[:16] = 0
    written = quantise(x, SCALINGS[name]).values_RC()
    assert (written[:16] == 0).all()
    assert (quantise(x * 0, SCALINGS[name]).values_RC() == 0).all()


@pytest.mark.parametrize("name", [name for name, each in SCALINGS.items() if each.block[0] == each.block[1]])
def test_squares_are_the_same_in_both_directions(name: str) -> None:
    x = values(256, 384)
    scaling = SCALINGS[name]
    assert torch.equal(quantise(x, scaling).values_RC().T, quantise(x.T.contiguous(), scaling).values_RC())


def test_lines_are_not() -> None:
    x, scaling = values(64, 64) * torch.exp(6 * values(64, 64, seed=1)), RECIPES["mxfp8"].weight
    assert not torch.equal(quantise(x, scaling).values_RC().T, quantise(x.T.contiguous(), scaling).values_RC())


def test_the_rotation_is_orthogonal_and_spreads_outliers() -> None:
    assert torch.allclose(matrix() @ matrix().T, torch.eye(16), atol=1e-7)
    x, y = values(8, 40), values(24, 40, seed=1)
    assert torch.allclose(rotate(x) @ rotate(y).T, x @ y.T, atol=1e-5)
    outlier = torch.zeros(1, 16)
    outlier[0, 3] = 16.0
    assert rotate(outlier).abs().max() == 4.0
