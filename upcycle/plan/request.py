"""Checks what a user asks for against the dense model and turns it into a `MoeShape`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, get_args

from upcycle.arch.moe import MoeShape, RouterOrder, Shared
from upcycle.errors import ConfigError, did_you_mean, nearest
from upcycle.plan.ahead import MADE
from upcycle.plan.groups import CHOICES, GROUPED_INITS, check_groups
from upcycle.plan.latent import LATENT_STARTS, check_latent, latent_start

if TYPE_CHECKING:
    from collections.abc import Sequence

    from upcycle.options.config import InitConfig, MoeConfig

ROUTER_ORDERS: tuple[RouterOrder, ...] = get_args(RouterOrder)
SCALING_RULES = ("exact", "paper", "down", "calibrated", "none")
AHEAD = ("keep", "none", *MADE)
INITS = ("virtual_group", "copy", "drop", "noise", "random")
MOST_EXPERTS = 2**16


def moe_shape(
    config: MoeConfig,
    init: InitConfig,
    *,
    ffn_width: int,
    hidden_size: int,
    layers: Sequence[int],
    order: RouterOrder = "softmax_topk",
) -> MoeShape:
    """Check `moe.*` and return the shape.

    Args:
        config: the request.
        init: a grouped initialization needs top_k to be a multiple of granularity.
        ffn_width: width of the dense FFN.
        hidden_size: of the dense model.
        layers: indices of the layers of the dense model that have an FFN.
        order: what moe.router_order=auto stands for.

    Raises:
        ConfigError: naming the option, what was found, and the nearest values that work.
    """
    for name in ("granularity", "top_k"):
        _at_least(f"moe.{name}", getattr(config, name), 1)
    _at_least("moe.shared_experts", config.shared_experts, 0)
    _choice("moe.router_order", config.router_order, ("auto", *ROUTER_ORDERS))
    _choice("moe.groups", config.groups, CHOICES)
    expansion = _expansion(config)
    check_latent(config, init, hidden_size)
    shared, shared_width = _shared(config, ffn_width)
    if latent_start(config.latent, init, hidden_size) == "exact" and init.name != "random":
        shared, shared_width = "whole", ffn_width
    cut = ffn_width - (shared_width if shared == "part" else 0)
    if cut % config.granularity:
        divisors = [g for g in range(1, cut + 1) if cut % g == 0]
        less = f" - shared_neurons {shared_width}" if shared == "part" else ""
        raise ConfigError(
            "the FFN cannot be cut into moe.granularity shards of equal width",
            found=f"d_ff {ffn_width}{less} % granularity {config.granularity} = {cut % config.granularity}",
            expected="a divisor of d_ff" + less,
            remedy=f"set moe.granularity to {nearest(config.granularity, divisors)}",
        )
    width = cut // config.granularity
    experts = expansion * config.granularity
    _check_experts(config.top_k, expansion, config.granularity)
    if init.name in GROUPED_INITS and config.top_k % config.granularity:
        multiples = range(config.granularity, experts + 1, config.granularity)
        raise ConfigError(
            "moe.top_k would break virtual groups: granularity experts are the whole FFN only if all are active",
            found=f"top_k {config.top_k} % granularity {config.granularity} = {config.top_k % config.granularity}",
            expected="a multiple of granularity",
            remedy=f"set moe.top_k to {nearest(config.top_k, multiples)}, or take init=copy or init=random",
        )
    groups = check_groups(config.groups, init, expansion=expansion, granularity=config.granularity, top_k=config.top_k)
    router_order = next((each for each in ROUTER_ORDERS if each == config.router_order), order)
    if router_order == "sigmoid_topk" and config.top_k == 1:
        more = "set moe.top_k to 2 or more, or " if experts > 1 else "set "
        raise ConfigError(
            "sigmoid_topk divides the weight of one selected expert by itself: it is always 1, and no router learns",
            found=f"moe.router_order={config.router_order}, moe.top_k=1",
            expected="a top_k of 2 or more",
            remedy=f"{more}moe.router_order=softmax_topk with target=auto",
        )
    return MoeShape(
        expansion=expansion,
        granularity=config.granularity,
        expert_width=width,
        top_k=config.top_k,
        router_order=router_order,
        shared=shared,
        shared_width=config.shared_experts * width if shared == "copies" else shared_width,
        layers=moe_layers(config.layers, layers),
        groups=groups,
        latent=config.latent,
    )


def check_ahead(mtp: str) -> None:
    """Check `mtp`.

    Raises:
        ConfigError: an unknown value.
    """
    _choice("mtp", mtp, AHEAD)


def check_init(init: InitConfig) -> None:
    """Check `init.*`.

    Raises:
        ConfigError: an unknown name or a number out of range.
    """
    _choice("init", init.name, INITS)
    scaling = init.scaling
    if isinstance(scaling, str):
        _choice("init.scaling", scaling, SCALING_RULES, also="or a positive number")
    elif isinstance(scaling, bool) or not isinstance(scaling, (int, float)) or not 0 < scaling < math.inf:
        raise ConfigError("init.scaling is out of range", found=scaling, expected="a positive number or a rule's name")
    for name in ("router_std", "std"):
        if not 0 <= (getattr(init, name) or 0.0) < math.inf:
            raise ConfigError(f"init.{name} is out of range", found=getattr(init, name), expected="0 or more, finite")
    _choice("init.latent", init.latent, LATENT_STARTS)
    _choice("init.neurons", init.neurons, ("coherent", "independent"))
    for name in ("ratio", "fraction"):
        if not 0 <= getattr(init, name) <= 1:
            raise ConfigError(f"init.{name} is out of range", found=getattr(init, name), expected="0 to 1")


def moe_layers(request: object, layers: Sequence[int]) -> tuple[int, ...]:
    """Indices of the MoE layers: "all", "every_K", or a list, all of which count layers that have an FFN, from 0.

    Raises:
        ConfigError: a form that is none of these, or an index that the model does not have.
    """
    if not layers:
        raise ConfigError(
            "no layer of the model has an FFN, so none can become a mixture of experts",
            found="0 layers with an FFN",
            expected="1 or more",
            remedy="take another model",
        )
    expected = f"all, every_2 (or another number), or a list of indices from 0 to {len(layers) - 1}"
    if request == "all":
        return tuple(layers)
    if isinstance(request, str) and request.startswith("every_") and request[6:].isdecimal() and int(request[6:]) > 0:
        step = int(request[6:])
        chosen: Sequence[int] = range(step - 1, len(layers), step)
    elif isinstance(request, list) and all(isinstance(index, int) for index in request):
        chosen = sorted(set(request))
    else:
        raise ConfigError("moe.layers is not understood", found=request, expected=expected)
    if not chosen or chosen[0] < 0 or chosen[-1] >= len(layers):
        raise ConfigError(
            "moe.layers names no layer, or one that the model does not have", found=request, expected=expected
        )
    return tuple(layers[index] for index in chosen)


def _shared(config: MoeConfig, ffn_width: int) -> tuple[Shared, int]:
    """What the shared expert is made of, and its width where that is not copies."""
    neurons = config.shared_neurons
    if neurons is None:
        return "copies", 0
    if config.shared_experts:
        raise ConfigError(
            "moe.shared_experts and moe.shared_neurons both say what the shared expert is made of",
            found=f"shared_experts={config.shared_experts}, shared_neurons={neurons}",
            expected="one of them",
        )
    if neurons == "all":
        return "whole", ffn_width
    if isinstance(neurons, bool) or not isinstance(neurons, int) or not 0 < neurons < ffn_width:
        expected = f"1 to {ffn_width - 1} of the FFN's {ffn_width} neurons, or all"
        raise ConfigError("moe.shared_neurons is out of range", found=neurons, expected=expected)
    return "part", neurons


def _check_experts(top_k: int, expansion: int, granularity: int) -> None:
    experts = expansion * granularity
    if experts > MOST_EXPERTS:
        raise ConfigError(
            "more experts than any router is meant for",
            found=f"{experts:,} (E {expansion} * G {granularity})",
            expected=f"at most {MOST_EXPERTS:,}",
            remedy="lower moe.expansion or moe.granularity",
        )
    if top_k > experts:
        raise ConfigError(
            "moe.top_k asks for more experts than there are",
            found=f"top_k {top_k} of {experts} experts (E {expansion} * G {granularity})",
            expected=f"at most {experts}",
            remedy=f"set moe.top_k to {experts} or less, or raise moe.expansion",
        )


def _expansion(config: MoeConfig) -> int:
    if not math.isfinite(config.expansion):
        raise ConfigError("moe.expansion is out of range", found=config.expansion, expected="1 or more, finite")
    if config.expansion != int(config.expansion):
        experts = config.expansion * config.granularity
        low, high = max(1, math.floor(config.expansion)), math.ceil(config.expansion)
        raise ConfigError(
            "the number of experts N must be a multiple of moe.granularity, that is moe.expansion a whole number",
            found=f"expansion {config.expansion:g} * granularity {config.granularity} = {experts:g} experts",
            expected="N % granularity = 0",
            remedy=f"set moe.expansion to {' or '.join(map(str, sorted({low, high})))}",
        )
    _at_least("moe.expansion", int(config.expansion), 1)
    return int(config.expansion)


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"{name} is out of range", found=value, expected=f"{least} or more")


def _choice(name: str, value: str, known: Sequence[str], also: str = "") -> None:
    if value not in known:
        expected = f"{', '.join(known)} {also}".rstrip()
        raise ConfigError(
            f"unknown value for {name}", found=value, expected=expected, remedy=did_you_mean(value, known)
        )
