"""Which blocks of the block-sparse matrix (tokens, experts * width) are computed, in torch.

MegaBlocks makes these with its compiled extension, which is not needed, and stores block indices in 16 bits: on Triton
3.2 and later they overflow when multiplied by the block size, from 32,768 padded tokens or columns on. Here they have
32 bits.

Shapes: S tokens, K experts per token, P = S * K pairs, N experts, B block rows, C block columns of one expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from upcycle.errors import ConfigError
from upcycle.kernels.triton_ops import triton_ops

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 128  # the only block size of stk's kernels
REACH = 2**31  # elements of a matrix that their 32-bit offsets can address


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Pairs sorted by expert, every expert's padded to whole blocks.

    Attributes:
        pair_P: the pair at each sorted position.
        expert_P: its expert.
        ends_N: where each expert's pairs end.
        padded_ends_N: where they end with padding.
        expert_B: the expert of each block row.
        top_k: K.
    """

    pair_P: Tensor
    expert_P: Tensor
    ends_N: Tensor
    padded_ends_N: Tensor
    expert_B: Tensor
    top_k: int


def padded_blocks(index_SK: Tensor, experts: int) -> Blocks:
    """Sort pairs by expert, stably, and pad. 64-bit, because MegaBlocks' copies multiply them by the hidden size."""
    expert_P, pair_P = index_SK.flatten().sort(stable=True)
    count_N = torch.bincount(expert_P, minlength=experts)
    rows_N = (count_N + BLOCK - 1) // BLOCK
    return Blocks(
        pair_P=pair_P,
        expert_P=expert_P,
        ends_N=count_N.cumsum(0),
        padded_ends_N=rows_N.cumsum(0) * BLOCK,
        expert_B=torch.arange(experts, device=index_SK.device).repeat_interleave(rows_N),
        top_k=index_SK.shape[1],
    )


def topology(blocks: Blocks, experts: int, width: int) -> Any:
    """An stk matrix without data, in which each block row has the blocks of its own expert.

    Args:
        blocks: the padded pairs.
        experts: N.
        width: columns of one expert, a multiple of BLOCK.

    Raises:
        ConfigError: the blocks have more elements than stk can address.
    """
    rows, columns = len(blocks.expert_B), width // BLOCK
    if rows * columns * BLOCK**2 >= REACH:
        raise ConfigError(
            "too many tokens at once for kernel=megablocks",
            found=f"{rows * BLOCK} padded tokens times width {width}",
            expected=f"fewer than {REACH} elements",
            remedy="a smaller micro-batch, or kernel=grouped_mm",
        )
    device = blocks.expert_B.device
    column_b = (blocks.expert_B[:, None] * columns + torch.arange(columns, device=device)).flatten()
    row_b = torch.arange(rows, device=device).repeat_interleave(columns)
    by_column_b = column_b.argsort(stable=True)
    ends = torch.bincount(column_b, minlength=experts * columns).cumsum(0)
    return triton_ops().stk.Matrix(
        (rows * BLOCK, experts * width),
        torch.empty(rows * columns, BLOCK, BLOCK, device="meta"),
        row_b.int(),
        column_b.int(),
        torch.arange(0, rows * columns + 1, columns, device=device).int(),
        row_b[by_column_b].int(),
        F.pad(ends, (1, 0)).int(),
        by_column_b.int(),
    )
