"""Weights that are drawn, made a few rows at a time so that memory does not grow with the matrix.

Shapes: `w_OI` is [out, in]; every function yields float32 blocks of its rows, in order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator

ELEMENTS_AT_ONCE = 2**20


def row_blocks(w_OI: Tensor) -> tuple[Tensor, ...]:
    """Views of consecutive rows, each of about `ELEMENTS_AT_ONCE` elements; entries of a vector count as rows."""
    if not w_OI.numel():
        return ()
    blocks: tuple[Tensor, ...] = w_OI.split(max(1, ELEMENTS_AT_ONCE * len(w_OI) // w_OI.numel()))
    return blocks


def drop_neurons(
    w_OI: Tensor, *, neuron_axis: int, ratio: float, neurons: torch.Generator, values: torch.Generator
) -> Iterator[Tensor]:
    """Draw a share of the neurons anew (Drop-Upcycling, arXiv 2502.19261).

    Args:
        w_OI: matrix of one expert.
        neuron_axis: 0 where neurons are rows, 1 where they are columns.
        ratio: share of neurons, rounded down.
        neurons: decides which; the same for gate, up and down where the set is coherent.
        values: draws the new weights from N(mean, std) of the weights that they replace.
    """
    count = w_OI.shape[neuron_axis]
    chosen = torch.zeros(count, dtype=torch.bool)
    chosen[torch.randperm(count, generator=neurons)[: int(count * ratio)]] = True
    chosen_OI = chosen.unsqueeze(1 - neuron_axis).expand(w_OI.shape)
    blocks = list(zip(row_blocks(w_OI), row_blocks(chosen_OI), strict=True))
    mean, std = _moments(block[mask] for block, mask in blocks)
    for block, mask in blocks:
        made = block.to(torch.float32, copy=True)
        made[mask] = torch.randn(int(mask.sum()), generator=values).mul_(std).add_(mean)
        yield made


def add_noise(w_OI: Tensor, *, std: float, fraction: float, values: torch.Generator) -> Iterator[Tensor]:
    """Add N(0, (std * w.std())^2) to a share of the weights, each chosen independently."""
    _, deviation = _moments(row_blocks(w_OI))
    for block in row_blocks(w_OI):
        noise = torch.randn(block.shape, generator=values).mul_(std * deviation)
        if fraction < 1:
            noise *= torch.rand(block.shape, generator=values) < fraction
        yield noise.add_(block)


def normal(rows: int, cols: int, *, std: float, repeat: int, values: torch.Generator) -> Iterator[Tensor]:
    """N(0, std^2), [rows, cols]; every drawn row stands `repeat` times in a row.

    With `repeat` = G this is virtual group initialization of a router (arXiv 2410.07524).
    """
    at_once = max(1, ELEMENTS_AT_ONCE // (cols * repeat))
    for start in range(0, rows // repeat, at_once):
        drawn = torch.randn(min(at_once, rows // repeat - start), cols, generator=values).mul_(std)
        yield drawn.repeat_interleave(repeat, dim=0) if repeat > 1 else drawn


def _moments(blocks: Iterator[Tensor] | tuple[Tensor, ...]) -> tuple[float, float]:
    """Mean and (population) standard deviation of all values; 0 and 0 where there are none."""
    count, total, squares = 0, 0.0, 0.0
    for block in blocks:
        values = block.double()
        count += values.numel()
        total += float(values.sum())
        squares += float(values.square().sum())
    if not count:
        return 0.0, 0.0
    mean = total / count
    return mean, max(0.0, squares / count - mean**2) ** 0.5
