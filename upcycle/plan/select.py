"""Chooses the MoE type: a native one when it expresses the request exactly, else `upcycled_moe`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from upcycle.arch.engines import Serving, features, serving
from upcycle.arch.targets import TARGETS
from upcycle.errors import ConfigError, TargetError, did_you_mean

if TYPE_CHECKING:
    from upcycle.arch.family import DenseModel
    from upcycle.arch.moe import MoeShape, RouterOrder
    from upcycle.arch.target import Target


def select_target(
    name: str, model: DenseModel, moe: MoeShape, *, portable: bool, ahead: bool = False
) -> tuple[Target, tuple[str, ...]]:
    """Return the MoE type and the reasons for it, one line each.

    Of those that express the request, the one that most engines serve exactly; of these, the first.

    Args:
        name: auto, or the type that was asked for.
        model: the dense model.
        moe: the request.
        portable: whether to write what other engines need.
        ahead: whether a new block for multi-token prediction is asked for.

    Raises:
        ConfigError: no such type.
        TargetError: the type asked for cannot express the request; names every field and the types that can.
    """
    objections = {target.model_type: target.objections(model, moe, ahead=ahead) for target in TARGETS.values()}
    fitting = [model_type for model_type, found in objections.items() if not found]
    if name == "auto" and fitting:
        found = features(model, moe, portable=portable)
        served = {each: serving(each, found) for each in fitting}
        chosen = max(fitting, key=lambda each: _exact(served[each]))  # of equals, the first
        reasons = [f"{other}: {'; '.join(map(str, objections[other]))}" for other in TARGETS if other not in fitting]
        for other in fitting[: fitting.index(chosen)]:
            elsewhere = (str(each) for each in served[other] if each.verdict != "exact")
            reasons.append(f"{other}, which expresses it too: {'; '.join(elsewhere)}")
        return TARGETS[chosen], (f"{chosen} expresses the model and the routing exactly", *reasons)
    if name == "auto":
        raise TargetError(
            "no type expresses this model and routing exactly",
            found="; ".join(f"{other}: {', '.join(map(str, found))}" for other, found in objections.items()),
            remedy="change what upcycled_moe, which takes most, cannot express",
        )
    if name not in TARGETS:
        known = ("auto", *TARGETS)
        raise ConfigError("unknown target", found=name, expected=", ".join(known), remedy=did_you_mean(name, known))
    if objections[name]:
        raise TargetError(
            f"target={name} cannot express this model and routing exactly",
            found="; ".join(map(str, objections[name])),
            expected="a type that can: " + ", ".join(fitting) if fitting else None,
            remedy=f"set target={fitting[0]}, or target=auto" if fitting else "change what is not expressible",
        )
    return TARGETS[name], (f"{name} was asked for, and expresses the model and the routing exactly",)


def own_order(model_type: str) -> RouterOrder:
    """The order of softmax, or sigmoids, and top-k of a dense family's own mixtures; softmax_topk where it has none."""
    return next((each.router_orders[0] for each in TARGETS.values() if each.family == model_type), "softmax_topk")


def _exact(served: tuple[Serving, ...]) -> int:
    return sum(each.verdict == "exact" for each in served)
