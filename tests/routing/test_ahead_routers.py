"""Routers of a block for multi-token prediction, which one forward pass of the model applies several times."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from routers import EXPERTS, router, routing, tokens

from upcycle.routing.config import BalanceConfig
from upcycle.routing.install import Routing

if TYPE_CHECKING:
    from upcycle.routing.router import Router

CLOSE = {"rtol": 1e-6, "atol": 1e-6}
FIRST, SECOND = tokens(30, seed=1), tokens(10, seed=2)


def with_ahead(*own: Router, ahead: Router, **balance: Any) -> Routing:
    made = dict(enumerate((*own, ahead)))
    return Routing(made, BalanceConfig(**balance), beyond=1)


@pytest.mark.parametrize("coefficients", [{"aux_loss": 1.0}, {"z_loss": 1.0}])
def test_several_passes_are_one_of_all_tokens(coefficients: dict[str, float]) -> None:
    """The mutant sees the last pass alone."""
    whole, parts, last = router(), router(passes=2), router()
    whole(torch.cat([FIRST, SECOND]))
    for each in (parts, last):
        each(tokens(50, seed=3))  # a micro-batch before
        each(FIRST)
        each(SECOND)
    expected, found, mutant = (routing(each, **coefficients).losses(0).total for each in (whole, parts, last))
    torch.testing.assert_close(found, expected, **CLOSE)
    assert not torch.allclose(mutant, expected, **CLOSE)
    (theirs,), (ours,) = (torch.autograd.grad(y, made.weight) for y, made in ((expected, whole), (found, parts)))
    torch.testing.assert_close(ours, theirs, **CLOSE)


def test_its_loss_weighs_as_much_as_that_of_a_layer_and_is_told_apart() -> None:
    a, b, ahead = router(seed=0), router(seed=1), router(passes=2, seed=2)
    for each in (a, b, ahead):
        each(FIRST)
    ahead(SECOND)
    balance = {"aux_loss": 0.5, "z_loss": 0.1}
    both, alone = with_ahead(a, b, ahead=ahead, **balance).losses(0), routing(ahead, **balance).losses(0)
    without = routing(a, b, **balance).losses(0)
    assert (both.aux, both.z) == (without.aux, without.z)
    assert both.ahead == (alone.aux, alone.z)
    assert without.ahead is None
    torch.testing.assert_close(both.total, without.total + alone.total / 2, **CLOSE)
    assert not with_ahead(a, b, ahead=ahead).losses(0).total.requires_grad


def test_statistics_and_biases_are_its_own() -> None:
    own, ahead = router(seed=0, bias=torch.zeros(EXPERTS)), router(passes=2, seed=1, bias=torch.zeros(EXPERTS))
    both = with_ahead(own, ahead=ahead, bias_update=0.1)
    for each in (own, ahead):
        each(FIRST)
    loads = ahead(SECOND)[2].flatten().bincount(minlength=EXPERTS)
    assert both.statistics().tokens.tolist() == [30]
    sums = both.ahead_statistics()
    assert sums
    assert sums.tokens.tolist() == [40]
    assert bool((sums.load[0] >= loads).all())
    assert routing(own).ahead_statistics() is None
    load = sums.load[0]
    both.end_step(0)
    assert torch.equal(ahead.e_score_correction_bias, 0.1 * torch.sign(load.double().mean() - load).float())
    assert own.e_score_correction_bias.any()
    with pytest.raises(RuntimeError, match="saw no forward"):
        both.losses(1)
