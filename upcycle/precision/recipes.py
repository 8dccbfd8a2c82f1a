"""Recipes of low precision as data: in which format each operand of the three products of a linear layer is written."""

from __future__ import annotations

from dataclasses import dataclass

from upcycle.precision.formats import E4M3, E5M2
from upcycle.precision.quantise import NVFP4, NVFP4_SQUARES, PLAIN_BF16, Scaling


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How the products of a linear layer are computed: y = x W^T, dx = dy W and dW = dy^T x.

    Every operand is written along the dimension that its product sums over, so that x, dy and W are written twice where
    a block is not a square.

    Attributes:
        name: as users say it.
        activation: of x.
        weight: of W.
        gradient: of dy.
        stochastic: dy is rounded stochastically.
        hadamard: both operands of dW are rotated over 16 tokens each before they are written.
        alignment: what both widths of a matrix have to be multiples of, for TransformerEngine's kernels; a block may
            be wider than what is left.
        tokens: what the tokens of each expert are padded to multiples of (Megatron-Core).
        capability: of the CUDA devices that compute it in hardware, at least.
        source: where it is from.
    """

    name: str
    activation: Scaling
    weight: Scaling
    gradient: Scaling
    stochastic: bool = False
    hadamard: bool = False
    alignment: int = 16
    tokens: int = 16
    capability: tuple[int, int]
    source: str


HYBRID = Scaling(format=E4M3, scale="float32")
LINES = Scaling(format=E4M3, block=(1, 128), scale="power_of_two")
MX = Scaling(format=E4M3, block=(1, 32), scale="e8m0")
RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="bf16",
            activation=PLAIN_BF16,
            weight=PLAIN_BF16,
            gradient=PLAIN_BF16,
            alignment=1,
            tokens=1,
            capability=(8, 0),
            source="operands in bfloat16, sums in float32",
        ),
        Recipe(
            name="fp8_current",
            activation=HYBRID,
            weight=HYBRID,
            gradient=Scaling(format=E5M2, scale="float32"),
            capability=(8, 9),
            source="TransformerEngine's Float8CurrentScaling, HYBRID; Nemotron-H (arXiv 2504.03624)",
        ),
        Recipe(
            name="fp8_current_e4m3",
            activation=HYBRID,
            weight=HYBRID,
            gradient=HYBRID,
            capability=(8, 9),
            source="TransformerEngine's Float8CurrentScaling, E4M3",
        ),
        Recipe(
            name="fp8_block",
            activation=LINES,
            weight=Scaling(format=E4M3, block=(128, 128), scale="power_of_two"),
            gradient=LINES,
            capability=(9, 0),
            source="TransformerEngine's Float8BlockScaling; DeepSeek-V3 (arXiv 2412.19437)",
        ),
        Recipe(
            name="mxfp8",
            activation=MX,
            weight=MX,
            gradient=MX,
            alignment=32,
            tokens=32,
            capability=(10, 0),
            source="TransformerEngine's MXFP8BlockScaling (arXiv 2310.10537)",
        ),
        Recipe(
            name="nvfp4",
            activation=NVFP4,
            weight=NVFP4_SQUARES,
            gradient=NVFP4,
            stochastic=True,
            hadamard=True,
            tokens=128,
            capability=(10, 0),
            source="TransformerEngine's NVFP4BlockScaling (arXiv 2509.25149); Nemotron 3 Super",
        ),
    )
}
