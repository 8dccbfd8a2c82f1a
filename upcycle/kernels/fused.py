"""The CPU kernel for training: one autograd function that takes two experts of similar load at a time.

What it does about the three costs of fine-grained experts on a CPU, where the matrix products are small:
- Two products in one `bmm` run one on each thread, twice as fast as one after the other on all threads. Any two experts
  are a strided view of the stacked weights, and of their gradient, so nothing is copied.
- Everything about two experts (gathered tokens, both projections) stays in cache until their tokens are added up.
- Gradients of the weights are written in place, once, instead of being stacked from one tensor per expert.

Shapes: S tokens, K experts per token, P = S * K pairs, H hidden, N experts, I expert width, R rows of the first
projection; in a group, b experts (1 or 2) and m pairs of each, the fewer ones padded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import pad_sequence

from upcycle.errors import ConfigError
from upcycle.kernels.activation import activation_of
from upcycle.kernels.experts import Kernel, layout_objection, sort_by_expert, stacked
from upcycle.kernels.memory import empty_like

if TYPE_CHECKING:
    from torch import Tensor, nn

    from upcycle.kernels.activation import Activation

SIMILAR = 0.75  # a smaller load than this share of the larger one is not worth padding


@dataclass(frozen=True, kw_only=True)
class Group:
    """Experts computed together.

    Attributes:
        experts: selects them in the stacked weights.
        pair_bm: their pairs; P, one past the last, where padded.
        token_bm: the pairs' tokens; where padded, any token.
    """

    experts: slice
    pair_bm: Tensor
    token_bm: Tensor


def group_experts(index_SK: Tensor, experts: int) -> list[Group]:
    """Pair up experts that have tokens, by falling load."""
    pairs = sort_by_expert(index_SK, experts)
    rows = pairs.pair_P.split(pairs.counts)
    by_load = sorted((e for e in range(experts) if pairs.counts[e]), key=lambda e: -pairs.counts[e])
    groups = []
    while by_load:
        first, *rest = by_load
        together = rest[:1] if rest and pairs.counts[rest[0]] >= SIMILAR * pairs.counts[first] else []
        by_load = rest[len(together) :]
        low, high = min([first, *together]), max([first, *together])
        chosen = slice(low, high + 1, max(1, high - low))
        pair_bm = pad_sequence([rows[e] for e in sorted({low, high})], True, index_SK.numel())
        token_bm = (pair_bm // index_SK.shape[1]).clamp_(max=index_SK.shape[0] - 1)
        groups.append(Group(experts=chosen, pair_bm=pair_bm, token_bm=token_bm))
    return groups


def fused(experts: nn.Module, x_SH: Tensor, index_SK: Tensor, weights_SK: Tensor) -> Tensor:
    """The weighted sum [S, H] of each token's experts; arguments as for `reference`. Differentiable once."""
    w = stacked(experts)
    device = x_SH.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_SH.dtype
    tensors = (w.up_NRH, w.down_NHI, w.up_bias_NR, w.down_bias_NH)
    cast = (None if tensor is None else tensor.to(dtype) for tensor in tensors)
    groups = group_experts(index_SK, w.up_NRH.shape[0])
    arguments = (x_SH.to(dtype), weights_SK, *cast, groups, activation_of(experts))
    y_SH: Tensor = _Fused.apply(*arguments)  # type: ignore[no-untyped-call]
    return y_SH.to(x_SH.dtype)


class _Fused(torch.autograd.Function):
    """Padded pairs weigh 0, so that they add zeros to outputs and gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        x_SH: Tensor,
        weights_SK: Tensor,
        up_NRH: Tensor,
        down_NHI: Tensor,
        up_bias_NR: Tensor | None,
        down_bias_NH: Tensor | None,
        groups: list[Group],
        activation: Activation,
    ) -> Tensor:
        weight_P = _with_padding(weights_SK)
        y_SH = torch.zeros_like(x_SH, dtype=_sum_dtype(x_SH))
        saved = []
        for group in groups:
            e = group.experts
            x_bmH = _gather(x_SH, group.token_bm)
            z_bmR = torch.bmm(x_bmH, up_NRH[e].mT)
            if up_bias_NR is not None:
                z_bmR += up_bias_NR[e, None]
            weight_bm1 = weight_P[group.pair_bm, None]
            y_bmH = torch.bmm(activation.value(z_bmR).mul_(weight_bm1), down_NHI[e].mT)
            if down_bias_NH is not None:
                y_bmH += (weight_bm1 * down_bias_NH[e, None]).to(x_SH.dtype)
            y_SH.index_add_(0, group.token_bm.flatten(), y_bmH.flatten(0, 1).to(y_SH.dtype))
            saved.append(z_bmR)
        ctx.save_for_backward(x_SH, weights_SK, up_NRH, down_NHI, up_bias_NR, down_bias_NH, *saved)
        ctx.groups, ctx.activation = groups, activation
        return y_SH.to(x_SH.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_SH: Tensor) -> tuple[Tensor | None, ...]:
        x_SH, weights_SK, up_NRH, down_NHI, up_bias_NR, down_bias_NH, *saved = ctx.saved_tensors
        weight_P = _with_padding(weights_SK)
        dweight_P = torch.zeros_like(weight_P)
        dx_SH = torch.zeros_like(x_SH, dtype=_sum_dtype(x_SH))
        dup, ddown = _unvisited_zero(up_NRH, ctx.groups), _unvisited_zero(down_NHI, ctx.groups)
        dup_bias, ddown_bias = (None if b is None else torch.zeros_like(b) for b in (up_bias_NR, down_bias_NH))
        for group, z_bmR in zip(ctx.groups, saved, strict=True):
            e = group.experts
            x_bmH, dy_bmH = _gather(x_SH, group.token_bm), _gather(dy_SH, group.token_bm)
            weight_bm1 = weight_P[group.pair_bm, None]
            dhw_bmI = torch.bmm(dy_bmH, down_NHI[e])
            h_bmI, dz_bmR = ctx.activation.value_and_gradient(z_bmR, (dhw_bmI * weight_bm1).to(x_SH.dtype))
            dweight_bm = (dhw_bmI * h_bmI).sum(-1, dtype=dx_SH.dtype)
            torch.bmm(dy_bmH.mT, h_bmI.mul_(weight_bm1), out=ddown[e])
            torch.bmm(dz_bmR.mT, x_bmH, out=dup[e])
            if dup_bias is not None and ddown_bias is not None:
                dup_bias[e] = dz_bmR.sum(1)
                ddown_bias[e] = (dy_bmH * weight_bm1).sum(1).to(x_SH.dtype)
                dweight_bm += (dy_bmH * down_bias_NH[e, None]).sum(-1, dtype=dx_SH.dtype)
            dweight_P[group.pair_bm] = dweight_bm.to(dweight_P.dtype)
            dx_bmH = torch.bmm(dz_bmR, up_NRH[e], out=x_bmH)
            dx_SH.index_add_(0, group.token_bm.flatten(), dx_bmH.flatten(0, 1).to(dx_SH.dtype))
        dweights_SK = dweight_P[:-1].view_as(weights_SK)
        return dx_SH.to(x_SH.dtype), dweights_SK, dup, ddown, dup_bias, ddown_bias, None, None


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _with_padding(weights_SK: Tensor) -> Tensor:
    return torch.cat([weights_SK.flatten(), weights_SK.new_zeros(1)])


def _unvisited_zero(w: Tensor, groups: list[Group]) -> Tensor:
    """An uninitialised gradient, zero for experts in no group."""
    gradient, every = empty_like(w), range(len(w))
    for e in set(every).difference(*(every[group.experts] for group in groups)):
        gradient[e] = 0
    return gradient


def _gather(x_SH: Tensor, token_bm: Tensor) -> Tensor:
    return x_SH.index_select(0, token_bm.flatten()).view(*token_bm.shape, -1)


def _objection(experts: nn.Module, device: torch.device, dtype: torch.dtype) -> ConfigError | None:
    if device.type != "cpu":
        return ConfigError(
            "kernel=fused is made for the CPU",
            found=f"device {device}",
            expected="cpu",
            remedy="kernel=auto, or kernel=grouped_mm",
        )
    return layout_objection(experts)


KERNEL = Kernel(name="fused", forward=fused, objection=_objection)
