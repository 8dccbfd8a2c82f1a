"""Bases of latent projections, in float64.

Shapes: H hidden size, L latent size, R rows of the matrices that read the FFN's input.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Of the mean variance, added to every direction: what text hardly visits is not known to be 0.
RIDGE = 1e-6


def orthonormal(rows: int, cols: int, values: torch.Generator) -> Tensor:
    """A matrix [rows, cols] of orthonormal columns, uniformly distributed; `rows` is at least `cols`."""
    drawn = torch.randn(rows, cols, generator=values, dtype=torch.float64)
    q, r = torch.linalg.qr(drawn)
    signed: Tensor = q * r.diagonal().sign()
    return signed


def input_basis(w_RH: Tensor, covariance_HH: Tensor, latent: int) -> tuple[Tensor, Tensor]:
    """The projection through L dimensions that changes w x least, over inputs x of a covariance.

    With C the covariance, w C^(1/2) has its best approximation of rank L in its first L right singular vectors V, so
    that x becomes C^(1/2) V V^T C^(-1/2) x. The rows of V^T C^(-1/2) are made orthonormal, which changes no product.

    Args:
        w_RH: the matrices that read the input, one above the other.
        covariance_HH: E[x x^T], not centred.
        latent: L.

    Returns:
        encode [L, H], of orthonormal rows, and decode [H, L]: x becomes decode @ encode @ x.
    """
    hidden = len(covariance_HH)
    mean = float(covariance_HH.diagonal().mean()) or 1.0
    values, vectors = torch.linalg.eigh(covariance_HH + RIDGE * mean * torch.eye(hidden, dtype=torch.float64))
    roots = values.clamp_min(0.5 * RIDGE * mean).sqrt()
    root_HH, inverse_HH = (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T
    whitened_RH = w_RH @ root_HH
    v_HL = _leading(whitened_RH.T @ whitened_RH, latent)
    q_HL, _ = torch.linalg.qr(inverse_HH @ v_HL)
    return q_HL.T, root_HH @ (v_HL @ (v_HL.T @ (inverse_HH @ q_HL)))


def output_basis(covariance_HH: Tensor, latent: int) -> Tensor:
    """The L orthonormal directions [H, L] in which outputs of a covariance, not centred, are largest."""
    return _leading(covariance_HH, latent)


def _leading(symmetric_HH: Tensor, count: int) -> Tensor:
    """Eigenvectors [H, count] of the largest eigenvalues, the largest first."""
    vectors: Tensor = torch.linalg.eigh(symmetric_HH).eigenvectors
    return vectors.flip(1)[:, :count]
