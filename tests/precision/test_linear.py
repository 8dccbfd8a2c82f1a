"""The three products of a linear layer: which operand is written how, by hand and by torch's kernel."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from upcycle.errors import TrainingError
from upcycle.precision.linear import Emulation, Site, quantised_linear
from upcycle.precision.quantise import Scaling, quantise
from upcycle.precision.recipes import RECIPES, Recipe
from upcycle.precision.rotation import rotate

TOKENS, INPUTS, OUTPUTS = 48, 256, 128
PLAIN = {name: replace(recipe, stochastic=False) for name, recipe in RECIPES.items()}
# Relative errors against exact products, of normal data; measured 0.03 and 0.04 in FP8, 0.13 and 0.15 in NVFP4.
WORST = {"bf16": 0.005, "fp8_current": 0.07, "fp8_current_e4m3": 0.05, "fp8_block": 0.05, "mxfp8": 0.05, "nvfp4": 0.25}


def operands(tokens: int = TOKENS) -> tuple[Tensor, Tensor, Tensor]:
    values = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, INPUTS, generator=values).requires_grad_()
    w = torch.randn(OUTPUTS, INPUTS, generator=values).requires_grad_()
    return x, w, torch.randn(tokens, OUTPUTS, generator=values)


def products(recipe: Recipe, *, tokens: int = TOKENS, micro_batch: str = "0") -> tuple[Tensor, Tensor, Tensor]:
    """y, dx and dW."""
    emulation = Emulation(0)
    emulation.micro_batch = micro_batch
    x, w, dy = operands(tokens)
    y = quantised_linear(x, w, Site(name="w", recipe=recipe, emulation=emulation))
    y.backward(dy)
    assert x.grad is not None
    assert w.grad is not None
    return y.detach(), x.grad, w.grad


def by_hand(recipe: Recipe) -> tuple[Tensor, Tensor, Tensor]:
    x, w, dy = (each.detach() for each in operands())

    def product(one: Tensor, of_one: Scaling, other: Tensor, of_other: Scaling) -> Tensor:
        written = (quantise(each.contiguous(), how).values_RC() for each, how in ((one, of_one), (other, of_other)))
        a, b = written
        return a @ b.T

    turned = rotate if recipe.hadamard else (lambda matrix: matrix)
    return (
        product(x, recipe.activation, w, recipe.weight),
        product(dy, recipe.gradient, w.T, recipe.weight),
        product(turned(dy.T), recipe.gradient, turned(x.T), recipe.activation),
    )


@pytest.mark.parametrize("name", PLAIN)
def test_each_operand_is_written_as_the_recipe_says(name: str) -> None:
    for ours, expected in zip(products(PLAIN[name]), by_hand(PLAIN[name]), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"hadamard": False},
        {"weight": RECIPES["nvfp4"].activation},
        {"gradient": RECIPES["fp8_current"].gradient},
        {"activation": RECIPES["mxfp8"].activation},
    ],
)
def test_another_recipe_is_noticed(changes: dict[str, object]) -> None:
    other = replace(PLAIN["nvfp4"], **changes)  # type: ignore[arg-type]
    same = [torch.equal(a, b) for a, b in zip(products(PLAIN["nvfp4"]), by_hand(other), strict=True)]
    assert not all(same)


@pytest.mark.parametrize("name", RECIPES)
def test_products_are_close_to_exact_ones(name: str) -> None:
    x, w, dy = (each.detach() for each in operands())
    for ours, exact in zip(products(RECIPES[name]), (x @ w.T, dy @ w, dy.T @ x), strict=True):
        error = float((ours - exact).norm() / exact.norm())
        assert 0 < error <= WORST[name]


def test_torch_computes_the_same_product() -> None:
    """`torch._scaled_mm` on the codes, up to the order of its sums."""
    x, w, _ = (each.detach() for each in operands())
    recipe = RECIPES["fp8_current"]
    a, b = quantise(x, recipe.activation), quantise(w, recipe.weight)
    codes = (each.numbers_RC.to(torch.float8_e4m3fn) for each in (a, b))
    one, other = codes
    theirs = torch._scaled_mm(one, other.T, scale_a=a.scale_RC[0, 0], scale_b=b.scale_RC[0, 0], out_dtype=torch.float32)
    torch.testing.assert_close(products(recipe)[0], theirs, rtol=1e-5, atol=1e-4)


def test_rounding_by_chance_depends_on_seed_micro_batch_and_tensor() -> None:
    recipe = RECIPES["nvfp4"]
    one, again, later = products(recipe), products(recipe), products(recipe, micro_batch="1")
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert torch.equal(one[0], later[0])  # nothing in the forward is rounded by chance
    assert not torch.equal(one[1], later[1])
    assert not torch.equal(one[2], later[2])


def test_gradients_are_right_on_average() -> None:
    """Rounding by chance leaves the mean of dx where it is without it; to the nearest, it is off."""
    exact = replace(RECIPES["nvfp4"], gradient=Scaling(format=RECIPES["bf16"].gradient.format, scale="none"))
    of_exact = products(replace(exact, stochastic=False))[1]
    many = torch.stack([products(RECIPES["nvfp4"], micro_batch=str(each))[1] for each in range(64)])
    by_chance = (many.mean(0) - of_exact).norm() / of_exact.norm()
    to_nearest = (products(PLAIN["nvfp4"])[1] - of_exact).norm() / of_exact.norm()
    assert by_chance < 0.5 * to_nearest


@pytest.mark.parametrize("name", RECIPES)
def test_no_tokens(name: str) -> None:
    """An expert that nobody visits has gradients of zero."""
    y, dx, dw = products(RECIPES[name], tokens=0)
    assert y.shape == (0, OUTPUTS)
    assert dx.shape == (0, INPUTS)
    assert torch.equal(dw, torch.zeros(OUTPUTS, INPUTS))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", RECIPES)
def test_what_is_not_finite_is_said(name: str, bad: float) -> None:
    x, w, _ = operands()
    with torch.no_grad():
        x[3, 5] = bad
    with pytest.raises(TrainingError, match="x of layer.3"):
        quantised_linear(x, w, Site(name="layer.3", recipe=RECIPES[name], emulation=Emulation(0)))


def test_outputs_have_the_dtype_of_the_rest() -> None:
    x, w, _ = operands()
    site = Site(name="w", recipe=RECIPES["fp8_block"], emulation=Emulation(0))
    with torch.autocast("cpu", torch.bfloat16):
        assert quantised_linear(x, w, site).dtype == torch.bfloat16
    assert quantised_linear(x.bfloat16(), w.bfloat16(), site).dtype == torch.bfloat16
