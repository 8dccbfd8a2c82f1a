"""Router rows that stay equal within a virtual group. Knows torch alone.

Shapes: N experts, H hidden, G experts per virtual group, E = N / G groups.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor import DTensor, Replicate

if TYPE_CHECKING:
    from torch import Tensor


def shared_rows(weight_NH: Tensor, granularity: int) -> Tensor:
    """One row per group [E, H], equal to its rows bit for bit; each of these gets 1/G of the gradient."""
    rows_EGH: Tensor = weight_NH.unflatten(0, (-1, granularity))
    mean_EH = rows_EGH.mean(dim=1)
    return rows_EGH[:, 0].detach() + (mean_EH - mean_EH.detach())


@torch.no_grad()
def tie(weight_NH: Tensor, granularity: int) -> None:
    """Copy each group's first row to the others, in place; of a sharded router, every rank has to call it.

    Gradients that are equal make updates that are equal up to rounding: vector units and reductions over ranks may
    round equal numbers at different places differently.
    """
    if not isinstance(weight_NH, DTensor):
        weight_NH.copy_(_repeated(weight_NH, granularity))
        return
    tied_NH = _repeated(weight_NH.full_tensor(), granularity)
    whole = [Replicate()] * weight_NH.device_mesh.ndim
    replicated = DTensor.from_local(tied_NH, weight_NH.device_mesh, whole, run_check=False)
    weight_NH.copy_(replicated.redistribute(weight_NH.device_mesh, weight_NH.placements))


def is_tied(weight_NH: Tensor, granularity: int) -> bool:
    """Whether the rows of every group are equal; of a sharded router, every rank has to call it."""
    full_NH = weight_NH.full_tensor() if isinstance(weight_NH, DTensor) else weight_NH
    return torch.equal(full_NH, _repeated(full_NH, granularity))


def _repeated(weight_NH: Tensor, granularity: int) -> Tensor:
    return weight_NH[::granularity].repeat_interleave(granularity, dim=0)
