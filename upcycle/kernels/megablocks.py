"""MegaBlocks' dropless block-sparse experts (arXiv 2211.15841) on the stacked weights of transformers.

Every expert's tokens are padded to whole blocks. The first projection of all experts is then one product of which only
each token block against its own expert is computed, and the second is that block-sparse matrix times a dense one.

Shapes: S tokens, K experts per token, P = S * K pairs, M pairs with padding, H hidden, N experts, I expert width, R
rows of the first projection. H, I and R are padded to whole blocks here, never in the checkpoint.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from transformers.integrations.moe import _default_apply_gate

from upcycle.errors import ConfigError
from upcycle.kernels.blocks import BLOCK, Blocks, padded_blocks, topology
from upcycle.kernels.experts import Kernel, Stacked, activate, layout_objection, stacked
from upcycle.kernels.triton_ops import triton_ops, why_missing

if TYPE_CHECKING:
    from torch import Tensor, nn

DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # stk accumulates others in integers
INSTALL = "make install-megablocks"


def megablocks(experts: nn.Module, x_SH: Tensor, index_SK: Tensor, weights_SK: Tensor) -> Tensor:
    """The weighted sum [S, H] of each token's experts; arguments as for `reference`. Differentiable once.

    Raises:
        ConfigError: more tokens than Triton's 32-bit offsets reach.
    """
    if not x_SH.shape[0]:
        return x_SH.clone()
    stk = triton_ops().stk
    w = _padded(stacked(experts), gated=bool(experts.has_gate))
    n_experts, H, width = w.down_NHI.shape
    blocks = padded_blocks(index_SK, n_experts)
    x_MH = _Gather.apply(_pad_to_block(x_SH, -1), blocks)  # type: ignore[no-untyped-call]
    up_topology = topology(blocks, n_experts, w.up_NRH.shape[1])
    z = stk.ops.sdd(x_MH, w.up_NRH.view(-1, H).t(), up_topology).data
    if w.up_bias_NR is not None:
        z = z + w.up_bias_NR.view(-1, 1, BLOCK)[up_topology.column_indices.long()]
    # The blocks of one block row lie one after the other, those of the gate first.
    h = activate(experts, z.view(len(blocks.expert_B), -1)).view(-1, BLOCK, BLOCK)
    h_sparse = _with_data(topology(blocks, n_experts, width), h)
    y_MH = stk.ops.dsd(h_sparse, w.down_NHI.transpose(1, 2).reshape(-1, H))
    if w.down_bias_NH is not None:
        y_MH = y_MH + w.down_bias_NH[blocks.expert_B.repeat_interleave(BLOCK)]
    y_SH: Tensor = _Scatter.apply(y_MH, weights_SK, blocks)  # type: ignore[no-untyped-call]
    return y_SH[:, : x_SH.shape[1]]


def _pad_to_block(tensor: Tensor, dim: int) -> Tensor:
    missing = -tensor.shape[dim] % BLOCK
    return F.pad(tensor, (0, 0) * (-dim - 1) + (0, missing)) if missing else tensor


def _padded(w: Stacked, *, gated: bool) -> Stacked:
    """Weights with zeros for the widths to be whole blocks; gate and up each on their own."""
    N, rows, H = w.up_NRH.shape
    halves = (2, rows // 2) if gated else (1, rows)
    up = _pad_to_block(_pad_to_block(w.up_NRH.view(N, *halves, H), -1), -2)
    bias = None if w.up_bias_NR is None else _pad_to_block(w.up_bias_NR.view(N, *halves), -1).flatten(1)
    return Stacked(
        up_NRH=up.flatten(1, 2),
        down_NHI=_pad_to_block(_pad_to_block(w.down_NHI, -1), -2),
        up_bias_NR=bias,
        down_bias_NH=None if w.down_bias_NH is None else _pad_to_block(w.down_bias_NH, -1),
    )


def _with_data(matrix: Any, data: Tensor) -> Any:
    """A block-sparse matrix of the same topology."""
    return triton_ops().stk.Matrix(
        matrix.size(),
        data,
        matrix.row_indices,
        matrix.column_indices,
        matrix.offsets,
        matrix.column_indices_t,
        matrix.offsets_t,
        matrix.block_offsets_t,
    )


class _Gather(torch.autograd.Function):
    """Rows [S, H] to padded rows [M, H], sorted by expert."""

    @staticmethod
    def forward(ctx: Any, x_SH: Tensor, blocks: Blocks) -> Tensor:
        ctx.blocks = blocks
        x_MH: Tensor = triton_ops().copies.padded_gather(x_SH.contiguous(), *_arguments(blocks, None))
        return x_MH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx_MH: Tensor) -> tuple[Tensor, None]:
        return triton_ops().copies.padded_scatter(dx_MH.contiguous(), *_arguments(ctx.blocks, None)), None


class _Scatter(torch.autograd.Function):
    """Padded rows [M, H] to their weighted sums [S, H]."""

    @staticmethod
    def forward(ctx: Any, y_MH: Tensor, weights_SK: Tensor, blocks: Blocks) -> Tensor:
        ctx.save_for_backward(y_MH, weights_SK)
        ctx.blocks = blocks
        y_SH: Tensor = triton_ops().copies.padded_scatter(y_MH, *_arguments(blocks, weights_SK.flatten()))
        return y_SH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_SH: Tensor) -> tuple[Tensor, Tensor, None]:
        y_MH, weights_SK = ctx.saved_tensors
        dy_SH, copies, blocks = dy_SH.contiguous(), triton_ops().copies, ctx.blocks
        dy_MH = copies.padded_gather(dy_SH, *_arguments(blocks, weights_SK.flatten()))
        indices, bin_ids, _, *rest = _arguments(blocks, None)
        dweight_P = copies.padded_scatter_wgrad(y_MH, dy_SH, indices, bin_ids, *rest)
        return dy_MH, dweight_P.view_as(weights_SK).to(weights_SK.dtype), None


def _arguments(blocks: Blocks, weight_P: Tensor | None) -> tuple[Any, ...]:
    """The arguments of MegaBlocks' padded copies after the matrix, in their order."""
    return blocks.pair_P, blocks.expert_P, weight_P, blocks.ends_N, blocks.padded_ends_N, blocks.top_k


def _objection(experts: nn.Module, device: torch.device, dtype: torch.dtype) -> ConfigError | None:
    if (missing := why_missing()) is not None:
        return ConfigError("kernel=megablocks is not installed", found=missing, remedy=INSTALL)
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return ConfigError(
            "kernel=megablocks runs on GPUs only", found=f"device {device}", expected="cuda", remedy="kernel=auto"
        )
    if dtype not in DTYPES:
        expected = " or ".join(str(known) for known in DTYPES)
        return ConfigError("kernel=megablocks does not compute in this dtype", found=dtype, expected=expected)
    if experts.has_gate and type(experts)._apply_gate is not _default_apply_gate:  # type: ignore[attr-defined]
        return ConfigError(
            "kernel=megablocks knows act(gate) * up only",
            found=f"{type(experts).__name__} with a gate of its own",
            remedy="kernel=auto",
        )
    return layout_objection(experts)


KERNEL = Kernel(name="megablocks", forward=megablocks, objection=_objection)
