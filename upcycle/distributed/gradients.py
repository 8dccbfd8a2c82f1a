"""The norm of a gradient whose tensors are sharded over different meshes, and clipping by it."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable

    from torch import Tensor, nn


def mesh_of(parameter: nn.Parameter) -> Hashable:
    """The ranks that a parameter is sharded over; None if it is not. One operation may not mix them."""
    return parameter.device_mesh if isinstance(parameter, DTensor) else None


def clip_by_norm(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Clip the gradient to an L2 norm, as `torch.nn.utils.clip_grad_norm_` does for parameters of one mesh.

    Args:
        parameters: of the model; each is in the norm once, however it is sharded or replicated.
        limit: the largest norm.

    Returns:
        The norm before, a scalar, the same on every rank.
    """
    by_mesh: dict[Hashable, list[nn.Parameter]] = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            by_mesh[mesh_of(parameter)].append(parameter)
    norms = (get_total_norm([each.grad for each in group if each.grad is not None]) for group in by_mesh.values())
    norm: Tensor = torch.linalg.vector_norm(
        torch.stack([n.full_tensor() if isinstance(n, DTensor) else n for n in norms])
    )
    for group in by_mesh.values():
        clip_grads_with_norm_(group, limit, norm)
    return norm
