"""Makes a model multiply in low precision: chooses its matrices, and gives each its recipe."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from upcycle.errors import ConfigError, near_misses
from upcycle.kernels.experts import LOW_PRECISION
from upcycle.precision.config import BFLOAT16, FLOAT32
from upcycle.precision.linear import Emulation, Site, quantised_linear
from upcycle.precision.quantise import ALL
from upcycle.precision.recipes import RECIPES
from upcycle.precision.sites import SITES, matrices

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from upcycle.models.moe import MoeDescription
    from upcycle.precision.config import QuantiseConfig
    from upcycle.precision.recipes import Recipe
    from upcycle.precision.sites import Matrices

CUT = "choose moe.granularity so that it is, or "
PRECISIONS = (FLOAT32, BFLOAT16, *RECIPES)
_log = logging.getLogger("upcycle")


def compute_dtype(precision: str, options: QuantiseConfig) -> torch.dtype:
    """What everything is multiplied in that no recipe applies to.

    Raises:
        ConfigError: an unknown precision.
    """
    if precision not in PRECISIONS:
        raise ConfigError("unknown precision", found=precision, expected=near_misses(precision, PRECISIONS))
    return torch.bfloat16 if BFLOAT16 in (precision, options.rest if precision in RECIPES else None) else torch.float32


def check_precision(precision: str, options: QuantiseConfig, *, compiled: bool, ranks: int) -> None:
    """Check what needs no model.

    Raises:
        ConfigError: an unknown precision, options that cannot work, or a recipe together with what would not follow it.
    """
    compute_dtype(precision, options)
    _check(options)
    if precision not in RECIPES:
        return
    switched(RECIPES[precision], options)
    if compiled:
        raise ConfigError(
            f"precision={precision} is emulated step by step", found="compile=true", remedy="compile=false"
        )
    if ranks > 1:
        raise ConfigError(
            f"precision={precision} is emulated in one process",
            found=f"{ranks} ranks",
            remedy="train in one process, or with precision=bfloat16",
        )


def install_precision(
    model: PreTrainedModel, moe: MoeDescription | None, precision: str, options: QuantiseConfig, *, seed: int
) -> Emulation | None:
    """Make a model's matrices be multiplied as a recipe says, emulated on its device; parameters and names stay.

    Args:
        model: a dense model or a MoE, which may be on the meta device.
        moe: its shape; None for a dense model.
        precision: float32 or bfloat16, which change nothing here, or the name of a recipe.
        options: what it applies to, and its switches.
        seed: of stochastic rounding.

    Returns:
        The state of its matrices; None without a recipe.

    Raises:
        ConfigError: options that leave nothing to do, or a matrix whose widths the recipe cannot divide.
    """
    if precision in (FLOAT32, BFLOAT16):
        return None
    recipe, every = switched(RECIPES[precision], options), list(matrices(model, moe))
    chosen = in_low_precision(every, model, recipe, options)
    emulation = Emulation(seed)
    for each in chosen:
        _install(each, Site(name=each.name, recipe=recipe, emulation=emulation))
    _log.info(
        "precision %s, emulated: %d of %d matrices or layers of experts (%s)",
        *(precision, len(chosen), len(every), ", ".join(dict.fromkeys(each.site for each in chosen))),
    )
    return emulation


def in_low_precision(
    every: list[Matrices], model: PreTrainedModel, recipe: Recipe, options: QuantiseConfig
) -> list[Matrices]:
    """Those of a model's matrices that a recipe applies to.

    Raises:
        ConfigError: there are none, or the recipe cannot divide the widths of one.
    """
    chosen = [each for each in every if each.site in options.sites and not _kept(each, model, options)]
    if not chosen:
        found = ", ".join(dict.fromkeys(each.site for each in every))
        raise ConfigError(
            "no matrix of the model would be in low precision",
            found=f"quantise.sites={list(options.sites)}, first={options.first:g}, last={options.last:g}",
            expected=f"some of what the model has: {found}",
        )
    for each in chosen:
        _check_widths(each, recipe)
    return chosen


def _check(options: QuantiseConfig) -> None:
    unknown = [each for each in options.sites if each not in SITES]
    if unknown:
        raise ConfigError("unknown quantise.sites", found=unknown[0], expected=near_misses(unknown[0], SITES))
    for name in ("first", "last"):
        if (value := getattr(options, name)) < 0 or (value > 1 and value % 1):
            raise ConfigError(
                f"quantise.{name} is no number of layers", found=value, expected="a whole number, or a share below 1"
            )


def switched(recipe: Recipe, options: QuantiseConfig) -> Recipe:
    """A recipe with its switches as the user wants them.

    Raises:
        ConfigError: squares=true where the recipe has none.
    """
    changes: dict[str, Any] = {
        name: value for name in ("stochastic", "hadamard") if (value := getattr(options, name)) is not None
    }
    if options.squares and not _has_squares(recipe):
        raise ConfigError(
            "quantise.squares=true is for recipes that have squares",
            found=recipe.name,
            expected=", ".join(each.name for each in RECIPES.values() if _has_squares(each)),
        )
    if options.squares is False and _has_squares(recipe):
        changes["weight"] = replace(recipe.weight, block=(1, recipe.weight.block[1]))
    return replace(recipe, **changes)


def _has_squares(recipe: Recipe) -> bool:
    rows, columns = recipe.weight.block
    return rows == columns != ALL


def _kept(each: Matrices, model: PreTrainedModel, options: QuantiseConfig) -> bool:
    """Whether its layer is left as it is."""
    layers = model.config.get_text_config().num_hidden_layers
    first, last = (_count(share, layers) for share in (options.first, options.last))
    return each.layer < first or each.layer >= layers - last


def _count(share: float, layers: int) -> int:
    return math.ceil(share * layers - 1e-9) if share < 1 else int(share)


def _check_widths(each: Matrices, recipe: Recipe) -> None:
    for name, weight in each.module.named_parameters(recurse=False):
        for width in weight.shape[-2:] if weight.dim() > 1 and not name.endswith("bias") else ():
            if width % recipe.alignment:
                below = width // recipe.alignment * recipe.alignment
                near = [size for size in (below, below + recipe.alignment) if size]
                raise ConfigError(
                    f"a width of {each.name} is not a multiple of {recipe.alignment}, as {recipe.name} needs it",
                    found=f"{name} {list(weight.shape)}",
                    expected=f"{' or '.join(map(str, near))} instead of {width}",
                    remedy=f"{CUT if each.site == 'experts' else ''}choose quantise.sites without {each.site}",
                )


def _install(each: Matrices, site: Site) -> None:
    module: Any = each.module
    if each.site == "experts":
        setattr(module, LOW_PRECISION, partial(_expert_linear, site=site))
    else:
        # Shadows the class's: parameters, their names and the module's class stay, which sharding and export look at.
        module.forward = partial(_linear if isinstance(module, nn.Linear) else _conv1d, module, site)


def _expert_linear(x_TI: Tensor, w_OI: Tensor, bias_O: Tensor | None, matrix: str, *, site: Site) -> Tensor:
    y_TO = quantised_linear(x_TI, w_OI, replace(site, name=f"{site.name}.{matrix}"))
    return y_TO if bias_O is None else y_TO + bias_O


def _linear(module: nn.Linear, site: Site, x_TI: Tensor) -> Tensor:
    y_TO = quantised_linear(x_TI, module.weight, site)
    return y_TO if module.bias is None else y_TO + module.bias


def _conv1d(module: Any, site: Site, x_TI: Tensor) -> Tensor:
    y_TO: Tensor = quantised_linear(x_TI, module.weight.T, site) + module.bias
    return y_TO
