"""Weight scaling: what undoes the router's weights, and which matrix carries it (arXiv 2410.07524).

The routed output of a virtual group initialised MoE is mass/G of the dense FFN's, where mass is the router weight of
all selected experts together: T/(E*G) for softmax-then-topK at a small router std, 1 for topK-then-softmax and for
sigmoids that are divided by their sum. So the output is multiplied by a = G/mass, which is E*G^2/T and G respectively.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from upcycle.arch.family import Role
    from upcycle.arch.moe import MoeShape

HOMOGENEITY = {"relu": 1, "relu2": 2}


@dataclass(frozen=True, kw_only=True)
class LayerScaling:
    """Factors of one layer.

    Attributes:
        output: a, what the routed output is multiplied by.
        matrix: factor of each weight matrix.
        bias: factor of each bias; the down bias counts once per selected expert, weighted by its probability.
    """

    output: float
    matrix: Mapping[Role, float]
    bias: Mapping[Role, float]


def expected_mass(moe: MoeShape) -> float:
    """Router weight of the selected experts together when all groups are equally likely."""
    return moe.top_k / moe.experts if moe.router_order == "softmax_topk" else 1.0


def degree(activation: str, *, gated: bool) -> int:
    """Degree of homogeneity of the FFN in its up matrix; 0 where it is not homogeneous (GELU without a gate)."""
    return 1 if gated else HOMOGENEITY.get(activation, 0)


def exact(output: float, *, granularity: int, degree: int, gated: bool) -> LayerScaling:
    """Scale the output by exactly `output`, whatever the activation.

    The up matrix takes a power of two u (about the (degree+1)-th root of a), the down matrix a/u^degree, the gate none.
    Powers of two lose nothing in storage, so a = 32 is exact in bfloat16 too. With degree 0 the down matrix takes all.
    """
    up = 2.0 ** math.floor(math.log2(output) / (degree + 1)) if degree else 1.0
    matrix: dict[Role, float] = {"up": up, "down": output / up**degree}
    bias: dict[Role, float] = {"up": up, "down": output / granularity}
    if gated:
        matrix["gate"] = bias["gate"] = 1.0
    return LayerScaling(output=output, matrix=matrix, bias=bias)


def paper(output: float, *, granularity: int, degree: int, gated: bool) -> LayerScaling:
    """The paper's rule: every matrix times a^(1/3), which is exact for squared ReLU alone (arXiv 2410.07524).

    The gate's bias and the bias of a non-homogeneous activation stay.
    """
    root = math.cbrt(output)
    matrix: dict[Role, float] = {"up": root, "down": root}
    bias: dict[Role, float] = {"up": root if degree else 1.0, "down": output / granularity}
    if gated:
        matrix["gate"], bias["gate"] = root, 1.0
    return LayerScaling(output=output, matrix=matrix, bias=bias)


def unscaled(*, gated: bool, output: float = 1.0) -> LayerScaling:
    """No factor on any tensor; `output` is what something else multiplies by."""
    ones: dict[Role, float] = {"up": 1.0, "down": 1.0}
    if gated:
        ones["gate"] = 1.0
    return LayerScaling(output=output, matrix=ones, bias=ones)


def in_config(rule: str | float) -> bool:
    """Whether a field of config.json can carry the whole factor, so that experts are copies of shards byte for byte."""
    return rule not in ("paper", "down", "none")


def layer_scaling(
    rule: str | float, *, mass: float, granularity: int, activation: str, gated: bool, field: bool = False
) -> LayerScaling:
    """The factors of one layer.

    Args:
        rule: exact, paper, down (all of a on the down matrix), calibrated, none, or the factor a itself.
        mass: router weight of the selected experts together, expected or measured.
        granularity: G.
        activation: transformers' name of the activation.
        gated: whether the FFN has a gate.
        field: whether the type has a field in config.json for it.
    """
    homogeneity = degree(activation, gated=gated)
    if rule == "none":
        return unscaled(gated=gated)
    output = granularity / mass if isinstance(rule, str) else rule
    if field and in_config(rule):
        return unscaled(gated=gated, output=output)
    if rule == "paper":
        return paper(output, granularity=granularity, degree=homogeneity, gated=gated)
    placed = 0 if rule == "down" else homogeneity
    return exact(output, granularity=granularity, degree=placed, gated=gated)


def lossless(rule: str | float, *, mass: float, granularity: int, activation: str, gated: bool) -> bool:
    """Whether a rule multiplies the routed output by exactly G/mass."""
    needed = granularity / mass
    if rule == "paper":
        return needed == 1.0 or (degree(activation, gated=gated) == 2 and not gated)
    applied = {"none": 1.0}.get(rule, needed) if isinstance(rule, str) else rule
    return math.isclose(applied, needed)
