"""A linear layer whose three products are computed from operands in low precision, with sums in float32.

Shapes: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from upcycle.errors import TrainingError
from upcycle.init.rng import generator
from upcycle.precision.quantise import quantise
from upcycle.precision.rotation import rotate

if TYPE_CHECKING:
    from collections.abc import Iterator

    from upcycle.precision.quantise import Scaling
    from upcycle.precision.recipes import Recipe


class Emulation:
    """The state that all matrices of a model in low precision share.

    Args:
        seed: of stochastic rounding.

    Attributes:
        micro_batch: what stochastic rounding depends on beside the seed and the tensor.
        active: whether products are computed in low precision.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self.micro_batch = ""
        self.active = True

    def randomness(self, tensor: str) -> torch.Generator:
        """Random numbers for a tensor in this micro-batch."""
        return generator(self._seed, f"rounding/{self.micro_batch}/{tensor}")

    @contextmanager
    def off(self) -> Iterator[None]:
        """Compute as without a recipe."""
        self.active = False
        try:
            yield
        finally:
            self.active = True


@dataclass(frozen=True, kw_only=True)
class Site:
    """A matrix of a model that is multiplied in low precision.

    Attributes:
        name: of the matrix.
        recipe: how.
        emulation: the model's.
    """

    name: str
    recipe: Recipe
    emulation: Emulation


def quantised_linear(x_TI: Tensor, w_OI: Tensor, site: Site) -> Tensor:
    """The product x W^T as a recipe computes it, and its gradients.

    Args:
        x_TI: [..., I].
        w_OI: the weight; its gradient is float32, as the sums are.
        site: whose product this is.

    Returns:
        [..., O], in the dtype that the product would have without the recipe.

    Raises:
        TrainingError: an operand is not finite.
    """
    if not site.emulation.active:
        return F.linear(x_TI, w_OI)
    y_TO: Tensor = _Linear.apply(x_TI.flatten(0, -2), w_OI, site)  # type: ignore[no-untyped-call]
    return y_TO.view(*x_TI.shape[:-1], len(w_OI))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, w_OI: Tensor, site: Site) -> Tensor:
        ctx.save_for_backward(x_TI, w_OI)
        ctx.site = site
        recipe = site.recipe
        y_TO = _values(x_TI, recipe.activation, site, "x") @ _values(w_OI, recipe.weight, site, "w").T
        device = x_TI.device.type
        return y_TO.to(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_TI.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (dy_TO,) = gradients
        x_TI, w_OI = ctx.saved_tensors
        site, recipe = ctx.site, ctx.site.recipe
        dx_TI = dw_OI = None
        if ctx.needs_input_grad[0]:
            dy = _values(dy_TO, recipe.gradient, site, "dy", stochastic=recipe.stochastic)
            dx_TI = (dy @ _values(w_OI.T, recipe.weight, site, "w").T).to(x_TI.dtype)
        if ctx.needs_input_grad[1]:
            dy_OT, x_IT = dy_TO.T.float(), x_TI.T.float()
            if recipe.hadamard:
                dy_OT, x_IT = rotate(dy_OT), rotate(x_IT)
            dy = _values(dy_OT, recipe.gradient, site, "dy^T", stochastic=recipe.stochastic)
            dw_OI = (dy @ _values(x_IT, recipe.activation, site, "x^T").T).to(w_OI.dtype)
        return dx_TI, dw_OI, None


def _values(x_RC: Tensor, scaling: Scaling, site: Site, role: str, *, stochastic: bool = False) -> Tensor:
    """An operand as it is in its format, float32."""
    if not torch.isfinite(x_RC).all():
        raise TrainingError(
            "a tensor that is to be written in low precision is not finite",
            found=f"{role} of {site.name}, whose largest magnitude is {float(x_RC.abs().max())}",
            expected=f"finite numbers, for {site.recipe.name}",
            remedy="lower schedule.peak or optim.clip, or leave its layer out with quantise.first or quantise.last",
        )
    values = site.emulation.randomness(f"{site.name}/{role}") if stochastic else None
    return quantise(x_RC.contiguous(), scaling, values=values).values_RC()
