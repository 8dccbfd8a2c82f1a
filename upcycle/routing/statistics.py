"""What routers did since the last reset, as sums on the device: reading them is what waits for it. Knows torch.

Shapes: T tokens, N experts, K experts per token, G experts per virtual group, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class RoutingSums:
    """Sums over the tokens of training forwards, on this rank, of one layer, or of all with a leading dimension L.

    Attributes:
        load: assignments per expert, before any is dropped, int64 [N].
        tokens: int64.
        dropped: assignments dropped for capacity, int64.
        entropy: of the router's probabilities, nats, float64.
        mass: the router's probability of the selected experts together, float64.
        whole: tokens whose experts make whole FFNs, int64.
    """

    load: Tensor
    tokens: Tensor
    dropped: Tensor
    entropy: Tensor
    mass: Tensor
    whole: Tensor

    def __add__(self, other: RoutingSums) -> RoutingSums:
        return RoutingSums(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


def whole_ffns(index_TK: Tensor, granularity: int, counted_TK: Tensor | None = None) -> Tensor:
    """Which tokens' experts make whole FFNs: every shard position is there equally often, bool [T].

    Args:
        index_TK: expert indices; expert e*G+g is at position g.
        granularity: G.
        counted_TK: which of them count; None counts all.
    """
    counted = torch.ones_like(index_TK) if counted_TK is None else counted_TK.to(index_TK.dtype)
    often_TG = index_TK.new_zeros(len(index_TK), granularity).scatter_add_(1, index_TK % granularity, counted)
    return (often_TG == often_TG[:, :1]).all(dim=-1)


def measure(
    probability_TN: Tensor, index_TK: Tensor, chosen_TK: Tensor, kept_TK: Tensor, load_N: Tensor, *, granularity: int
) -> RoutingSums:
    """The sums of one forward.

    Args:
        probability_TN: the router's probabilities, float32, which sum to 1.
        index_TK: expert indices.
        chosen_TK: which of them are no padding.
        kept_TK: which of those are within the experts' capacity.
        load_N: assignments per expert.
        granularity: G.
    """
    return RoutingSums(
        load=load_N,
        tokens=load_N.new_full((), len(index_TK)),
        dropped=chosen_TK.sum() - kept_TK.sum(),
        entropy=torch.special.entr(probability_TN).sum(dtype=torch.float64),
        mass=(probability_TN.gather(-1, index_TK) * chosen_TK).sum(dtype=torch.float64),
        whole=whole_ffns(index_TK, granularity, chosen_TK).sum(),
    )


def no_sums(experts: int, device: torch.device) -> RoutingSums:
    """The sums of no forward at all."""
    count, real = torch.zeros((), dtype=torch.int64, device=device), torch.zeros((), dtype=torch.float64, device=device)
    load = count.new_zeros(experts)
    return RoutingSums(load=load, tokens=count, dropped=count, entropy=real, mass=real, whole=count)


def stack(layers: list[RoutingSums]) -> RoutingSums:
    """Sums of all layers, each with a leading dimension L."""
    return RoutingSums(**{f.name: torch.stack([getattr(sums, f.name) for sums in layers]) for f in fields(RoutingSums)})
