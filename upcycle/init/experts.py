"""Experts that differ from a plain copy. Shapes: `w_OI` is [out, in]."""

from __future__ import annotations

import torch
from torch import Tensor


def drop_neurons(
    w_OI: Tensor, *, neuron_axis: int, ratio: float, neurons: torch.Generator, values: torch.Generator
) -> Tensor:
    """Draw a share of the neurons anew (Drop-Upcycling, arXiv 2502.19261, section 3.2).

    Args:
        w_OI: matrix of one expert.
        neuron_axis: 0 where neurons are rows, 1 where they are columns.
        ratio: share of neurons, rounded down.
        neurons: decides which; the same for gate, up and down where the set is coherent.
        values: draws the new weights from N(mean, std) of the weights that they replace.

    Returns:
        A new float32 matrix.
    """
    w_OI = w_OI.to(torch.float32, copy=True)
    count = w_OI.shape[neuron_axis]
    chosen = torch.randperm(count, generator=neurons)[: int(count * ratio)]
    if len(chosen) == 0:
        return w_OI
    dropped = w_OI.index_select(neuron_axis, chosen)
    fresh = torch.randn(dropped.shape, generator=values) * dropped.std(correction=0) + dropped.mean()
    return w_OI.index_copy_(neuron_axis, chosen, fresh)


def add_noise(w_OI: Tensor, *, std: float, fraction: float, values: torch.Generator) -> Tensor:
    """Add N(0, (std * w.std())^2) to a share of the weights, each chosen independently.

    Returns:
        A new float32 matrix.
    """
    w_OI = w_OI.to(torch.float32, copy=True)
    noise = torch.randn(w_OI.shape, generator=values) * (std * w_OI.std(correction=0))
    if fraction < 1:
        noise *= torch.rand(w_OI.shape, generator=values) < fraction
    return w_OI.add_(noise)


def normal(rows: int, cols: int, *, std: float, repeat: int, values: torch.Generator) -> Tensor:
    """N(0, std^2) in float32, [rows, cols]; every drawn row stands `repeat` times in a row.

    With `repeat` = G this is virtual group initialization of a router (arXiv 2410.07524, section 4.1).
    """
    drawn = torch.randn(rows // repeat, cols, generator=values) * std
    return drawn.repeat_interleave(repeat, dim=0)
