"""How experts of virtual groups are chosen: what may be asked for, what `auto` is, what training does to groups."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, get_args

from upcycle.arch.moe import Groups
from upcycle.errors import ConfigError, nearest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from upcycle.arch.moe import MoeShape
    from upcycle.arch.target import Target
    from upcycle.options.config import InitConfig

GROUPED_INITS = ("virtual_group", "drop", "noise")
TOGETHER = ("tied", "whole", "positions")
IN_TRAINING = {
    "free": "experts are chosen one by one; in training their router rows come apart within some ten steps, tokens get "
    "some shards twice and others never, and the loss rises",
    "tied": "the router rows of a group stay equal in training, so top-k keeps groups whole; an engine that trains "
    "rows one by one tears groups apart",
    "whole": "groups are chosen as wholes, in training too",
    "positions": "every token gets every shard of the FFN, in training too, whatever the router",
}
CHOICES: tuple[Groups, ...] = get_args(Groups)


def check_groups(groups: str, init: InitConfig, *, expansion: int, granularity: int, top_k: int) -> Groups:
    """Check one of `CHOICES` against the shape and the initialization.

    Raises:
        ConfigError: one of them has no such groups.
    """
    if groups in TOGETHER:
        check_divisible(groups, granularity=granularity, top_k=top_k, experts=expansion * granularity)
    if groups == "tied" and init.name not in GROUPED_INITS:
        raise ConfigError(
            f"moe.groups=tied needs router rows that are equal within a group, and init={init.name} draws each anew",
            found=f"init={init.name}",
            expected="init=" + ", ".join(GROUPED_INITS),
            remedy="set moe.groups=positions, which needs no equal rows",
        )
    return next(each for each in CHOICES if each == groups)


def check_divisible(groups: str, *, granularity: int, top_k: int, experts: int) -> None:
    """Check that experts can be chosen by groups.

    Raises:
        ConfigError: there are no groups, or top_k is not a multiple of their size.
    """
    if granularity == 1 or experts % granularity:
        raise ConfigError(
            f"moe.groups={groups} needs virtual groups, and there are none",
            found=f"granularity={granularity}, {experts} experts",
            expected="a granularity above 1 that divides the experts",
            remedy="leave moe.groups out: experts that are whole FFNs are chosen one by one",
        )
    if top_k % granularity:
        multiples = range(granularity, experts + 1, granularity)
        raise ConfigError(
            f"moe.groups={groups} needs a top_k that is a multiple of the granularity",
            found=f"top_k={top_k}, granularity={granularity}, {experts} experts",
            expected="a multiple of granularity",
            remedy=f"set moe.top_k to {nearest(top_k, multiples)}, or moe.groups=free",
        )


def settled(moe: MoeShape, init: InitConfig, target: Target) -> MoeShape:
    """The shape with `auto` replaced by what keeps the dense model's start in this type.

    Router rows that are equal within a group stay so in a native type; `upcycled_moe` chooses by position. Where the
    shape or the initialization has no groups to keep, experts are chosen one by one.
    """
    if moe.groups != "auto":
        return moe
    if moe.granularity == 1 or moe.top_k % moe.granularity or init.name == "random":
        return replace(moe, groups="free")
    if target.generic:
        return replace(moe, groups="positions")
    return replace(moe, groups="tied" if init.name in GROUPED_INITS else "free")


def group_notes(moe: MoeShape) -> Iterator[str]:
    """What training will do to the groups of a shape, a line each."""
    if moe.granularity == 1:
        return
    yield f"moe.groups={moe.groups}: {IN_TRAINING[moe.groups]}"
    if moe.groups != "free" and moe.router_order != "softmax_topk" and moe.top_k == moe.granularity:
        yield (
            f"{moe.router_order} with top_k = granularity gives every choice the same weight, so the router gets no "
            "gradient from the language model's loss, and at a high learning rate the first steps cost loss, as they "
            "do with granularity 1: take a larger top_k, softmax_topk, or optim.expert_lr=0.5"
        )
