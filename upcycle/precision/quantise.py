"""Matrix -> numbers of a format and the scales that they are multiplied with.

Shapes: R rows, C columns of a matrix whose products sum over C; r rows and c columns share a scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F

from upcycle.precision.formats import BF16, E2M1, E4M3, nearest, stochastic

if TYPE_CHECKING:
    from torch import Tensor

    from upcycle.precision.formats import Format

ScaleKind = Literal["none", "float32", "power_of_two", "e8m0", "e4m3"]
ALL = -1  # rows or columns
LARGEST = torch.finfo(torch.float32).max
LEAST_EXPONENT, LARGEST_EXPONENT = -127, 127  # of E8M0


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """How a matrix is written in a format.

    Attributes:
        format: of its numbers.
        block: rows and columns that share a scale; ALL for those of the whole matrix.
        scale: what a scale may be: none is 1; float32 and power_of_two let the largest number of the block fill the
            format (TransformerEngine's current and block scaling); e8m0 is a power of two too, rounded so that nothing
            is cut off (MX, arXiv 2310.10537, with the rounding of TransformerEngine); e4m3 has a float32 factor for the
            matrix besides (NVFP4, arXiv 2509.25149).
    """

    format: Format
    block: tuple[int, int] = (ALL, ALL)
    scale: ScaleKind

    @property
    def bytes_per_number(self) -> float:
        """With its scales, of which kernels keep one for each line of a block; one for the matrix counts nothing."""
        columns = self.block[1]
        return self.format.bits / 8 + (0 if columns == ALL else SCALE_BYTES[self.scale] / columns)


SCALE_BYTES = {"none": 0, "float32": 4, "power_of_two": 4, "e8m0": 1, "e4m3": 1}
PLAIN_BF16 = Scaling(format=BF16, scale="none")


@dataclass(frozen=True, kw_only=True)
class Quantised:
    """A matrix in a format.

    Attributes:
        numbers_RC: of the format, float32.
        scale_RC: what they are multiplied with, float32, one for each block, broadcast over it.
    """

    numbers_RC: Tensor
    scale_RC: Tensor

    def values_RC(self) -> Tensor:
        """What the matrix is now, float32."""
        return self.numbers_RC * self.scale_RC


def quantise(x_RC: Tensor, scaling: Scaling, *, values: torch.Generator | None = None) -> Quantised:
    """Write a matrix in a format.

    Args:
        x_RC: finite numbers.
        scaling: how.
        values: random numbers for stochastic rounding; None rounds to the nearest.
    """
    x_RC = x_RC.float()
    rows, columns = x_RC.shape
    r, c = (size if each == ALL else each for each, size in zip(scaling.block, (rows, columns), strict=True))
    if x_RC.numel() == 0:
        return Quantised(numbers_RC=x_RC, scale_RC=torch.ones_like(x_RC))
    padded = F.pad(x_RC, (0, -columns % c, 0, -rows % r))
    blocks = padded.view(padded.shape[0] // r, r, padded.shape[1] // c, c)
    amax = blocks.abs().amax((1, 3), keepdim=True)
    encode, decode = _SCALES[scaling.scale](amax, scaling.format)
    scaled = blocks * encode
    numbers = nearest(scaled, scaling.format) if values is None else stochastic(scaled, scaling.format, values=values)

    def as_matrix(part: Tensor) -> Tensor:
        return part.expand_as(blocks).reshape(padded.shape)[:rows, :columns]

    return Quantised(numbers_RC=as_matrix(numbers), scale_RC=as_matrix(decode))


def _one(amax: Tensor, _format: Format) -> tuple[Tensor, Tensor]:
    return torch.ones_like(amax), torch.ones_like(amax)


def _filling(amax: Tensor, format: Format) -> Tensor:
    """What takes the largest number of a block to the largest of the format; 1 where all are zero."""
    # A quotient of tensors: torch computes `number / tensor` with a reciprocal, and that is one unit off at times.
    encode = torch.div(torch.full_like(amax, format.largest), amax).clamp_max(LARGEST)
    return torch.where(amax == 0, 1.0, encode)


def _float32(amax: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    encode = _filling(amax, format)
    return encode, encode.reciprocal()


def _power_of_two(amax: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    exponent = torch.frexp(_filling(amax, format)).exponent - 1
    encode = torch.ldexp(torch.ones_like(amax), exponent)
    return encode, encode.reciprocal()


def _e8m0(amax: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    mantissa, exponent = torch.frexp(amax * (1 / torch.full_like(amax, format.largest)))
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)  # a power of two is its own, others are rounded up
    exponent = torch.where(amax == 0, LEAST_EXPONENT, exponent).clamp(LEAST_EXPONENT, LARGEST_EXPONENT)
    one = torch.ones_like(amax)
    return torch.ldexp(one, -exponent), torch.ldexp(one, exponent)


def _e4m3(amax: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    whole = amax.amax()
    largest = torch.full_like(whole, E4M3.largest * format.largest)
    outer = torch.div(largest, whole).clamp_max(LARGEST)
    decode = nearest(amax * (outer * torch.full_like(whole, format.largest).reciprocal()), E4M3) * outer.reciprocal()
    return torch.div(torch.ones_like(decode), decode).clamp_max(LARGEST), decode


_SCALES = {"none": _one, "float32": _float32, "power_of_two": _power_of_two, "e8m0": _e8m0, "e4m3": _e4m3}
NVFP4 = Scaling(format=E2M1, block=(1, 16), scale="e4m3")
NVFP4_SQUARES = Scaling(format=E2M1, block=(16, 16), scale="e4m3")
