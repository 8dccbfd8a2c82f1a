"""What kernels need to know of an experts module: its stacked weights, its activation, and pairs sorted by expert.

Shapes: S tokens, K experts per token, P = S * K pairs, H hidden, N experts, I expert width, R rows of the first
projection (2 * I with a gate, else I).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from upcycle.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    # (x [T, I], weight [O, I], bias [O] or None, which matrix) -> [T, O]
    Product = Callable[[Tensor, Tensor, Tensor | None, str], Tensor]

LOW_PRECISION = "_low_precision"  # attribute of an experts module: the `Product` that it is to be computed with


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One way to compute experts.

    Attributes:
        name: as users say it.
        forward: the function, in the signature of transformers' registry.
        objection: why it cannot serve an experts module on a device in a dtype, or None.
    """

    name: str
    forward: Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
    objection: Callable[[nn.Module, torch.device, torch.dtype], ConfigError | None]


def layout_objection(
    experts: nn.Module, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> ConfigError | None:
    """Why none of our kernels can serve an experts module, whatever the device and dtype."""
    known = ("is_transposed", "has_post_expert_norm", "_is_expert_parallel")
    strange = [name for name in known if getattr(experts, name, False)]  # older transformers have not all of them
    if not strange:
        return None
    return ConfigError(
        "this kernel does not know the layout of these experts",
        found=f"{type(experts).__name__} with {', '.join(strange)}",
        expected="weights [N, out, in], no norm after the experts, all experts on one device",
        remedy="kernel=grouped_mm",
    )


@dataclass(frozen=True, kw_only=True)
class Stacked:
    """The weights of an experts module in the layout of transformers.

    Attributes:
        up_NRH: first projection: gate and up, or up alone.
        down_NHI: second projection.
        up_bias_NR: bias of the first projection, or None.
        down_bias_NH: bias of the second projection, or None.
    """

    up_NRH: Tensor
    down_NHI: Tensor
    up_bias_NR: Tensor | None
    down_bias_NH: Tensor | None


def stacked(experts: Any) -> Stacked:
    """The weights that transformers' `use_experts_implementation` declares with `has_gate` and `has_bias`.

    Under expert parallelism these are the rank's own experts, in plain tensors that are no parameters.
    """
    up = "gate_up_proj" if experts.has_gate else "up_proj"
    return Stacked(
        up_NRH=getattr(experts, up),
        down_NHI=experts.down_proj,
        up_bias_NR=getattr(experts, f"{up}_bias") if experts.has_bias else None,
        down_bias_NH=experts.down_proj_bias if experts.has_bias else None,
    )


def activate(experts: Any, z_SR: Tensor) -> Tensor:
    """From the output of the first projection [..., R] to the input of the second [..., I]."""
    h_SI: Tensor = experts._apply_gate(z_SR) if experts.has_gate else experts.act_fn(z_SR)
    return h_SI


@dataclass(frozen=True, kw_only=True)
class Sorted:
    """The (token, expert) pairs in the order of their experts; pair p is slot p % K of token p // K.

    Attributes:
        pair_P: the pair at each sorted position.
        token_P: its token.
        counts: pairs of each expert, N numbers.
    """

    pair_P: Tensor
    token_P: Tensor
    counts: list[int]


def sort_by_expert(index_SK: Tensor, experts: int) -> Sorted:
    """Sort pairs by expert, stably, so that the order of every sum is fixed."""
    expert_P = index_SK.flatten()
    pair_P = expert_P.argsort(stable=True)
    counts = torch.bincount(expert_P, minlength=experts).tolist()
    return Sorted(pair_P=pair_P, token_P=pair_P // index_SK.shape[1], counts=counts)
