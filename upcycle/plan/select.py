"""Chooses the MoE type: a native one when it expresses the request exactly, else `upcycled_moe`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from upcycle.arch.targets import TARGETS
from upcycle.errors import ConfigError, TargetError, did_you_mean

if TYPE_CHECKING:
    from upcycle.arch.family import DenseModel
    from upcycle.arch.moe import MoeShape
    from upcycle.arch.target import Target


def select_target(name: str, model: DenseModel, moe: MoeShape) -> tuple[Target, tuple[str, ...]]:
    """Return the MoE type and the reasons for it, one line each.

    Raises:
        ConfigError: no such type.
        TargetError: the type asked for cannot express the request; names every field and the types that can.
    """
    objections = {target.model_type: target.objections(model, moe) for target in TARGETS.values()}
    fitting = [model_type for model_type, found in objections.items() if not found]
    if name == "auto":
        chosen = fitting[0]
        passed_over = [other for other in TARGETS if other not in fitting]
        reasons = [f"{other}: {'; '.join(map(str, objections[other]))}" for other in passed_over]
        return TARGETS[chosen], (f"{chosen} expresses the model and the routing exactly", *reasons)
    if name not in TARGETS:
        known = ("auto", *TARGETS)
        raise ConfigError("unknown target", found=name, expected=", ".join(known), remedy=did_you_mean(name, known))
    if objections[name]:
        raise TargetError(
            f"target={name} cannot express this model and routing exactly",
            found="; ".join(map(str, objections[name])),
            expected="a type that can: " + ", ".join(fitting),
            remedy=f"set target={fitting[0]}, or target=auto",
        )
    return TARGETS[name], (f"{name} was asked for, and expresses the model and the routing exactly",)
