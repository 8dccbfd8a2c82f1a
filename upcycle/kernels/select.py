"""Chooses a kernel for a model, says why, and makes the model use it. Alone touches transformers' registry."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from upcycle.errors import ConfigError, near_misses
from upcycle.kernels import fused, grouped_mm, loop, megablocks, reference
from upcycle.kernels.experts import LOW_PRECISION

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from upcycle.kernels.experts import Kernel

KERNELS: dict[str, Kernel] = {
    kernel.name: kernel
    for kernel in (
        *(reference.KERNEL, loop.KERNEL, fused.KERNEL, grouped_mm.KERNEL, megablocks.KERNEL),
        loop.EMULATED,
    )
}
NAMES: tuple[str, ...] = ("auto", *KERNELS)
PREFIX = "upcycle_"  # transformers' registry is shared, and already has a `grouped_mm`

_log = logging.getLogger("upcycle")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A kernel and the reason for it.

    Attributes:
        name: one of NAMES, never `auto`.
        why: one sentence.
    """

    name: str
    why: str


def install_kernel(model: PreTrainedModel, name: str, *, device: torch.device, dtype: torch.dtype) -> Choice:
    """Make every experts module of a model use a kernel, and log which.

    Args:
        model: a MoE model of transformers, or an `upcycled_moe`.
        name: one of NAMES; `auto` is decided by the device.
        device: where the model will run.
        dtype: what it will compute in.

    Raises:
        ConfigError: an unknown name, a model without experts, or a kernel that cannot serve one of them.
    """
    if name not in NAMES:
        raise ConfigError("unknown kernel", found=name, expected=near_misses(name, NAMES))
    layers = experts_modules(model)
    if not layers:
        raise ConfigError(
            "the model has no experts that a kernel could compute",
            found=type(model).__name__,
            expected="a mixture of experts of transformers, or upcycled_moe",
        )
    choice = _automatic(layers, device, dtype) if name == "auto" else Choice(name=name, why="asked for")
    _check_precision(choice.name, layers)
    if error := _objection(KERNELS[choice.name], layers, device, dtype):
        raise error
    # How tokens fall on experts differs in every step: torch.compile would compile again each time.
    ALL_EXPERTS_FUNCTIONS.register(PREFIX + choice.name, torch.compiler.disable(KERNELS[choice.name].forward))
    # transformers' own `set_experts_implementation` looks for its decorator in the source of the model's class, and the
    # one that FSDP2 makes has none.
    for experts in layers:
        experts.config._experts_implementation = PREFIX + choice.name
    _log.info("kernel %s: %s", choice.name, choice.why)
    return choice


def experts_modules(model: nn.Module) -> list[Any]:
    """The modules that transformers' `use_experts_implementation` made."""
    return [module for module in model.modules() if hasattr(module, "_apply_gate")]


def _in_low_precision(layers: list[Any]) -> bool:
    return any(hasattr(experts, LOW_PRECISION) for experts in layers)


def _check_precision(name: str, layers: list[Any]) -> None:
    """Raise ConfigError if a kernel would ignore the precision that experts are to be computed in."""
    if (name == loop.EMULATED.name) != _in_low_precision(layers):
        raise ConfigError(
            "the kernel does not fit the precision",
            found=f"kernel={name}, experts {'' if _in_low_precision(layers) else 'not '}in low precision",
            expected=f"{loop.EMULATED.name} for experts in low precision, and another one for others",
            remedy="kernel=auto chooses",
        )


def _automatic(layers: list[Any], device: torch.device, dtype: torch.dtype) -> Choice:
    if _in_low_precision(layers):
        return Choice(name=loop.EMULATED.name, why="the one that computes in low precision")
    if device.type == "cpu":
        return Choice(name="fused", why="the fastest on a CPU")
    error = _objection(grouped_mm.KERNEL, layers, device, dtype)
    if error is None:
        return Choice(name="grouped_mm", why=f"needs nothing installed on {device.type}")
    return Choice(name="loop", why=f"works everywhere; {error.what}")


def _objection(kernel: Kernel, layers: list[Any], device: torch.device, dtype: torch.dtype) -> ConfigError | None:
    errors = (kernel.objection(experts, device, dtype) for experts in layers)
    return next((error for error in errors if error), None)
