"""How far experts have moved from the dense model, and from each other.

Shapes: N experts, G shards per FFN, E = N / G copies, D weights of one matrix of one expert.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from upcycle.convert.materialise import Materialiser

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from upcycle.convert.prepare import Conversion
    from upcycle.models.moe import MoeDescription

Matrices = dict[str, Tensor]


def expert_matrices(experts: nn.Module) -> Matrices:
    """Views of a layer's routed experts by matrix (gate, up, down), each [N, D]; gathered from all ranks."""
    stacked = {name: value.detach() for name, value in experts.named_parameters() if value.dim() == 3}
    return _split({name: v.full_tensor() if isinstance(v, DTensor) else v for name, v in stacked.items()})


def shard_reader(conversion: Conversion, moe: MoeDescription) -> Callable[[int], Matrices]:
    """Return a function from a layer to its dense shards by matrix, each [G, D], in float32.

    Args:
        conversion: to one group of unscaled experts in `upcycled_moe`.
        moe: the model that is trained.
    """
    materialiser = Materialiser(conversion.source.read, 0)

    def read(layer: int) -> Matrices:
        stacked = {
            tensor.name.rpartition(".")[2]: materialiser.tensor(tensor, torch.float32)
            for tensor in conversion.plan.tensors
            if tensor.layer == layer and tensor.kind == "expert" and len(tensor.shape) == 3
        }
        return _split(stacked)

    return cache(read)


def dense_cosine(experts: Matrices, shards: Matrices) -> Tensor:
    """Cosine of each expert to the shard it came from, the mean over its matrices, [N].

    A factor on a whole matrix, which is how upcycling scales, leaves it at 1. All zeros equal all zeros.
    """
    cosines = []
    for name, weight in experts.items():
        came_from = shards[name].to(weight).repeat(len(weight) // len(shards[name]), 1)
        both_zero_N = ~(weight.any(1) | came_from.any(1))
        cosines.append(F.cosine_similarity(weight, came_from, dim=1).masked_fill(both_zero_N, 1.0))
    return torch.stack(cosines).mean(0)


def group_cosine(experts: Matrices, *, granularity: int) -> float | None:
    """Cosine between experts that came from the same shard, the mean over pairs, shards and matrices; None if E = 1.

    All zeros equal all zeros.
    """
    means = []
    for weight in experts.values():
        copies = len(weight) // granularity
        if copies < 2:
            return None
        unit_EGD = F.normalize(weight, dim=1).unflatten(0, (copies, granularity))
        zero_G = (~unit_EGD.any(-1)).sum(0)
        # The squared norm of a sum of unit vectors counts every ordered pair, and each vector with itself.
        pairs_G = unit_EGD.sum(0).square().sum(-1) - (copies - zero_G) + zero_G * (zero_G - 1)
        means.append(pairs_G.mean() / (copies * (copies - 1)))
    return float(torch.stack(means).mean())


def _split(stacked: Matrices) -> Matrices:
    split = {}
    for name, value in stacked.items():
        if name == "gate_up_proj":
            split["gate"], split["up"] = (half.flatten(1) for half in value.chunk(2, dim=1))
        else:
            split[name.removesuffix("_proj")] = value.flatten(1)
    return split
