"""Activations of experts and their gradients, for kernels that write their own backward.

Shapes: R outputs of the first projection (2 * I with a gate, else I), I expert width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import SiLUActivation
from transformers.integrations.moe import _default_apply_gate

from upcycle.kernels.experts import activate

if TYPE_CHECKING:
    from torch import Tensor


class Activation(Protocol):
    """From the output of the first projection [..., R] to the input of the second [..., I]."""

    def value(self, z_R: Tensor) -> Tensor:
        """The input of the second projection, in memory of its own."""

    def value_and_gradient(self, z_R: Tensor, dh_I: Tensor) -> tuple[Tensor, Tensor]:
        """The value as above, and the gradient of `z_R` [..., R] given the value's gradient `dh_I`."""


def activation_of(experts: nn.Module) -> Activation:
    """The activation of an experts module."""
    gate = getattr(type(experts), "_apply_gate", None)
    if experts.has_gate and gate is _default_apply_gate and isinstance(experts.act_fn, nn.SiLU | SiLUActivation):
        return SwiGlu()
    return Recorded(experts)


class SwiGlu:
    """`silu(gate) * up`, without autograd's copies of the two halves."""

    def value(self, z_R: Tensor) -> Tensor:
        gate_I, up_I = z_R.chunk(2, dim=-1)
        return F.silu(gate_I).mul_(up_I)

    def value_and_gradient(self, z_R: Tensor, dh_I: Tensor) -> tuple[Tensor, Tensor]:
        gate_I, up_I = z_R.chunk(2, dim=-1)
        silu_I, dz_R = F.silu(gate_I), torch.empty_like(z_R)
        dgate_I, dup_I = dz_R.chunk(2, dim=-1)
        torch.mul(dh_I, silu_I, out=dup_I)
        torch.ops.aten.silu_backward.grad_input(dh_I * up_I, gate_I, grad_input=dgate_I)
        return silu_I.mul_(up_I), dz_R


class Recorded:
    """Any activation, recorded by autograd while its gradient is needed."""

    def __init__(self, experts: nn.Module) -> None:
        self.experts = experts

    def value(self, z_R: Tensor) -> Tensor:
        return _own(activate(self.experts, z_R), z_R)

    def value_and_gradient(self, z_R: Tensor, dh_I: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf_R = z_R.detach().requires_grad_()
            h_I = activate(self.experts, leaf_R)
        (dz_R,) = torch.autograd.grad(h_I, leaf_R, dh_I)
        return _own(h_I, leaf_R).detach(), dz_R


def _own(h_I: Tensor, z_R: Tensor) -> Tensor:
    """The identity returns its argument."""
    return h_I.clone() if h_I is z_R else h_I
