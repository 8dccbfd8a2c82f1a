"""Options of low precision; the defaults are in `conf/train.yaml`. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from upcycle.options.config import STRICT

FLOAT32, BFLOAT16 = "float32", "bfloat16"  # of `precision`, beside the recipes: nothing is written in fewer bits


@dataclass(frozen=True, kw_only=True)
class QuantiseConfig:
    """`quantise.*`: what a recipe of low precision applies to, and its switches; null is as the recipe has it.

    Attributes:
        sites: ffn (dense FFNs), experts (routed ones), shared (experts), attention, mamba2: whose matrices.
        first, last: layers whose matrices are left as they are; below 1, a share of all layers, rounded up.
        stochastic: gradients are rounded stochastically.
        hadamard: operands of the weights' gradients are rotated over 16 tokens each.
        squares: weights have a scale for a square of numbers, and the same numbers in both directions.
        rest: float32, or bfloat16 (mixed), for everything else.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    sites: list[str] = field(default_factory=lambda: ["ffn", "experts", "shared"])
    first: float = 0
    last: float = 0
    stochastic: bool | None = None
    hadamard: bool | None = None
    squares: bool | None = None
    rest: Literal["float32", "bfloat16"] = "bfloat16"
