"""The randomised Hadamard transform that spreads outliers before a matrix is written in four bits.

Shapes: R rows, C columns.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from torch import Tensor

SIZE = 16
# One sign for each of 16 positions, for all layers and steps: TransformerEngine's (arXiv 2509.25149, section 4.2).
SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)


def rotate(x_RC: Tensor) -> Tensor:
    """Rotate every 16 columns, with zeros added to the last ones; products of two rotated matrices over C stay.

    Returns:
        [R, C rounded up to 16], in the dtype of x_RC.
    """
    padded = F.pad(x_RC, (0, -x_RC.shape[1] % SIZE))
    return (padded.reshape(-1, SIZE) @ matrix().to(padded)).view_as(padded)


@lru_cache
def matrix() -> Tensor:
    """Orthogonal, float32 [16, 16]: Sylvester's, its rows with signs."""
    hadamard = torch.ones(1, 1)
    while len(hadamard) < SIZE:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    return torch.diag(torch.tensor(SIGNS, dtype=torch.float32)) @ hadamard / math.sqrt(SIZE)
