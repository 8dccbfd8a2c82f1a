"""What low precision would apply to in a model that need not be there, and what it takes: for `upcycle plan`.

Needs a configuration alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from upcycle.arch.head import head_of
from upcycle.models.heads import auto_class
from upcycle.precision.install import check_precision, in_low_precision, switched
from upcycle.precision.recipes import RECIPES
from upcycle.precision.sites import matrices

if TYPE_CHECKING:
    from upcycle.models.moe import MoeDescription
    from upcycle.precision.config import QuantiseConfig
    from upcycle.precision.recipes import Recipe

DIRECTIONS = 2  # in which kernels keep a weight: along the sums of y and of dx
MASTER_BYTES = 2  # of a weight in bfloat16, which stays


@dataclass(frozen=True, kw_only=True)
class LayerPrecision:
    """What of a layer is in low precision.

    Attributes:
        layer: its index.
        sites: what its matrices belong to, and whether they are in low precision, by site.
        parameters: in low precision.
    """

    layer: int
    sites: dict[str, bool]
    parameters: int


@dataclass(frozen=True, kw_only=True)
class PrecisionPlan:
    """What a recipe would do to a model.

    Attributes:
        recipe: with its switches.
        layers: all of the model's.
        parameters: of the model, and of them those in low precision.
        bytes_per_parameter: of a weight in low precision on a GPU: itself in bfloat16, and written in both directions.
        padded: rows of padding over rows of tokens in the experts, expected; 0 for a dense model.
        tokens: per micro-batch, of which that is said.
    """

    recipe: Recipe
    layers: tuple[LayerPrecision, ...]
    parameters: tuple[int, int]
    bytes_per_parameter: float
    padded: float
    tokens: int


def plan_precision(
    config: Any, moe: MoeDescription | None, precision: str, options: QuantiseConfig, *, tokens: int
) -> PrecisionPlan:
    """Plan low precision.

    Args:
        config: the model's transformers configuration.
        moe: its shape; None for a dense model.
        precision: name of a recipe.
        options: as for training.
        tokens: per micro-batch, on one device.

    Raises:
        ConfigError: as training would.
    """
    check_precision(precision, options, compiled=False, ranks=1)
    recipe = switched(RECIPES[precision], options)
    with torch.device("meta"):
        model = auto_class(head_of(config.to_dict())).from_config(config)
    every = list(matrices(model, moe))
    names = {each.name for each in in_low_precision(every, model, recipe, options)}
    copies = 0 if recipe.weight.scale == "none" else DIRECTIONS * recipe.weight.bytes_per_number
    layers = []
    for layer in dict.fromkeys(each.layer for each in every):
        of_layer = [each for each in every if each.layer == layer]
        low = [each for each in of_layer if each.name in names]
        sizes = [p.numel() for each in low for p in each.module.parameters(recurse=False) if p.dim() > 1]
        sites = {each.site: each.name in names for each in of_layer}
        layers.append(LayerPrecision(layer=layer, sites=sites, parameters=sum(sizes)))
    return PrecisionPlan(
        recipe=recipe,
        layers=tuple(layers),
        parameters=(model.num_parameters(), sum(each.parameters for each in layers)),
        bytes_per_parameter=MASTER_BYTES + copies,
        padded=moe.experts * (recipe.tokens - 1) / 2 / (tokens * moe.top_k) if moe else 0.0,
        tokens=tokens,
    )
