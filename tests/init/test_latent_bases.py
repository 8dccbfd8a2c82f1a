"""The bases of latent projections: orthonormal where they say so, and the best there are for what they were told."""

from __future__ import annotations

import pytest
import torch

from upcycle.init.latent import input_basis, orthonormal, output_basis
from upcycle.init.rng import generator

HIDDEN, ROWS, TOKENS = 12, 20, 400


@pytest.fixture(scope="module")
def measured():
    """Inputs of very different variance by direction, and the matrices that read them."""
    values = generator(0, "test")
    mixing = torch.randn(HIDDEN, HIDDEN, generator=values, dtype=torch.float64)
    scales = torch.logspace(0, -3, HIDDEN, dtype=torch.float64)
    x_TH = torch.randn(TOKENS, HIDDEN, generator=values, dtype=torch.float64) * scales @ mixing
    return torch.randn(ROWS, HIDDEN, generator=values, dtype=torch.float64), x_TH


def lost(w_RH, x_TH, encode_LH, decode_HL):
    """Squared error of w x, relative."""
    seen_TH = x_TH @ encode_LH.T @ decode_HL.T
    return float(((seen_TH - x_TH) @ w_RH.T).square().sum() / (x_TH @ w_RH.T).square().sum())


def best(w_RH, x_TH, latent):
    """What no projection through L dimensions can be below: the rest of the spectrum of w x (Eckart and Young)."""
    squares = torch.linalg.svdvals(x_TH @ w_RH.T).square()
    return float(squares[latent:].sum() / squares.sum())


@pytest.mark.parametrize("latent", [1, 3, 6, 11])
def test_no_projection_loses_less(latent, measured):
    w_RH, x_TH = measured
    found = lost(w_RH, x_TH, *input_basis(w_RH, x_TH.T @ x_TH, latent))
    assert found == pytest.approx(best(w_RH, x_TH, latent), rel=0.02, abs=1e-6)


def test_without_the_covariance_more_is_lost(measured):
    w_RH, x_TH = measured
    white = input_basis(w_RH, torch.eye(HIDDEN, dtype=torch.float64), 3)
    assert lost(w_RH, x_TH, *white) > 3 * lost(w_RH, x_TH, *input_basis(w_RH, x_TH.T @ x_TH, 3))


@pytest.mark.parametrize("latent", [1, 5, HIDDEN])
def test_it_is_a_projection_with_orthonormal_rows(latent, measured):
    w_RH, x_TH = measured
    encode_LH, decode_HL = input_basis(w_RH, x_TH.T @ x_TH, latent)
    unit = torch.eye(latent, dtype=torch.float64)
    torch.testing.assert_close(encode_LH @ encode_LH.T, unit, rtol=0, atol=1e-10)
    torch.testing.assert_close(encode_LH @ decode_HL, unit, rtol=0, atol=1e-6)


def test_inputs_of_fewer_dimensions_than_asked_for(measured):
    """A layer norm without weights takes one away."""
    w_RH, x_TH = measured
    x_TH = x_TH - x_TH.mean(1, keepdim=True)
    encode_LH, decode_HL = input_basis(w_RH, x_TH.T @ x_TH, HIDDEN)
    assert bool(encode_LH.isfinite().all())
    assert lost(w_RH, x_TH, encode_LH, decode_HL) < 1e-9


def test_nothing_known_of_the_inputs(measured):
    encode_LH, decode_HL = input_basis(measured[0], torch.zeros(HIDDEN, HIDDEN, dtype=torch.float64), 4)
    assert bool(encode_LH.isfinite().all() and decode_HL.isfinite().all())


def test_outputs_keep_the_largest_directions():
    covariance_HH = torch.diag(torch.tensor([1.0, 9.0, 4.0], dtype=torch.float64))
    assert torch.equal(output_basis(covariance_HH, 2).abs(), torch.eye(3, dtype=torch.float64)[:, [1, 2]])


def test_drawn_directions_follow_from_the_key():
    one, again, other = (orthonormal(HIDDEN, 5, generator(0, key)) for key in ("a", "a", "b"))
    assert torch.equal(one, again)
    assert not torch.allclose(one, other)
    torch.testing.assert_close(one.T @ one, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-12)
