"""Floating-point formats of few bits, and rounding to them. Knows torch alone.

E4M3 and E5M2 are those of arXiv 2209.05433, E2M1 that of the OCP Microscaling specification 1.0 (arXiv 2310.10537).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Format:
    """A format of small floats.

    Attributes:
        name: as the field says it.
        bits: of a number.
        mantissa: bits after the leading one.
        least_exponent: of the normal numbers; below it lie the subnormal ones, equally far from each other.
        largest: finite number.
        dtype: torch's, where it has one; its conversion is the same as `nearest`, and faster.
    """

    name: str
    bits: int
    mantissa: int
    least_exponent: int
    largest: float
    dtype: torch.dtype | None = None


BF16 = Format(
    name="BF16", bits=16, mantissa=7, least_exponent=-126, largest=torch.finfo(torch.bfloat16).max, dtype=torch.bfloat16
)
E4M3 = Format(name="E4M3", bits=8, mantissa=3, least_exponent=-6, largest=448.0, dtype=torch.float8_e4m3fn)
E5M2 = Format(name="E5M2", bits=8, mantissa=2, least_exponent=-14, largest=57344.0, dtype=torch.float8_e5m2)
E2M1 = Format(name="E2M1", bits=4, mantissa=1, least_exponent=0, largest=6.0)


def nearest(x: Tensor, format: Format) -> Tensor:
    """The nearest number of a format, of two the even one; beyond the largest, the largest.

    Args:
        x: float32, no NaN.
        format: whose numbers.

    Returns:
        float32.
    """
    limited = x.clamp(-format.largest, format.largest)
    if format.dtype is not None:
        return limited.to(format.dtype).float()
    step = spacing(limited, format)
    return (limited / step).round() * step


def stochastic(x: Tensor, format: Format, *, values: torch.Generator) -> Tensor:
    """One of the two neighbours in a format, the nearer one more often, so that the mean is x; as `nearest` beyond.

    Args:
        x: float32, no NaN.
        format: whose numbers.
        values: where the random numbers come from, on any device: the same ones for all.

    Returns:
        float32.
    """
    limited = x.clamp(-format.largest, format.largest)
    step = spacing(limited, format)
    chance = torch.rand(x.shape, generator=values, device=values.device).to(x.device)
    return ((limited / step + chance).floor() * step).clamp(-format.largest, format.largest)


def spacing(x: Tensor, format: Format) -> Tensor:
    """The distance of the numbers of a format around x: a power of two, so that dividing by it is exact."""
    exponent = (torch.frexp(x).exponent - 1).clamp_min(format.least_exponent)
    return torch.ldexp(torch.ones_like(x), exponent - format.mantissa)
