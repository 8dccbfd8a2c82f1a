"""Refuses routing that cannot work, before anything is installed. Knows the options and what a MoE is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from upcycle.errors import ConfigError, near_misses
from upcycle.plan.groups import check_divisible
from upcycle.routing.config import Schedule

if TYPE_CHECKING:
    from upcycle.models.moe import MoeDescription
    from upcycle.routing.config import BalanceConfig, RouterConfig

NAMES = {
    "router.score": ("softmax", "sigmoid"),
    "router.order": ("softmax_topk", "topk_softmax"),
    "balance.statistics": ("micro_batch", "global_batch"),
    "balance.bias_per": ("group", "expert"),
}
AFTER_RELEASE = ("free", "positions")
COEFFICIENTS = ("aux_loss", "z_loss", "bias_update")


def uses_sigmoid(moe: MoeDescription, router: RouterConfig) -> bool:
    """Whether scores are sigmoids once the options are applied."""
    return router.score == "sigmoid" or (router.score is None and moe.router_order == "sigmoid_topk")


def check_routing(moe: MoeDescription, router: RouterConfig, balance: BalanceConfig) -> None:
    """Check the options against each other and against the model.

    Raises:
        ConfigError: the first option, or combination, that cannot work.
    """
    _check_names(router, balance)
    _check_ranges(router, balance)
    _check_scores(moe, router)
    _check_experts(moe, router)
    if router.expert_choice:
        _check_expert_choice(moe, router, balance)


def _check_names(router: RouterConfig, balance: BalanceConfig) -> None:
    given = {
        "router.score": router.score,
        "router.order": router.order,
        "balance.statistics": balance.statistics,
        "balance.bias_per": balance.bias_per,
    }
    for option, value in given.items():
        if value is not None and value not in NAMES[option]:
            raise ConfigError(f"unknown {option}", found=value, expected=near_misses(value, NAMES[option]))


def _check_ranges(router: RouterConfig, balance: BalanceConfig) -> None:
    capacity, scaling = router.capacity_factor, router.scaling_factor
    if capacity is not None and not capacity > 0:
        raise ConfigError(
            "router.capacity_factor must be positive", found=capacity, remedy="use null for dropless routing"
        )
    if scaling is not None and not scaling > 0:
        raise ConfigError("router.scaling_factor must be positive", found=scaling)
    if not 0 <= router.jitter < 1:
        raise ConfigError("router.jitter is out of range", found=router.jitter, expected="at least 0 and below 1")
    if router.release and not 0 < router.release.until < 1:
        raise ConfigError(
            "router.release.until is outside the budget",
            found=router.release.until,
            expected="a share of it, above 0 and below 1",
        )
    for name in COEFFICIENTS:
        _check_coefficient(f"balance.{name}", getattr(balance, name))


def _check_coefficient(option: str, value: Any) -> None:
    scheduled = isinstance(value, Schedule)
    if scheduled and value.steps < 1:
        raise ConfigError(f"{option}.steps must be at least 1", found=value.steps)
    for number in (value.start, value.end) if scheduled else (value,):
        if not number >= 0:
            raise ConfigError(f"{option} must not be negative", found=number)


def _check_scores(moe: MoeDescription, router: RouterConfig) -> None:
    sigmoid = uses_sigmoid(moe, router)
    if sigmoid and router.order is not None:
        raise ConfigError(
            "router.order is for softmax scores, and these are sigmoids",
            found=router.order,
            remedy="leave router.order out, or set router.score=softmax",
        )
    if not sigmoid and router.order is None and moe.router_order == "sigmoid_topk":
        raise ConfigError(
            "the checkpoint's scores are sigmoids, so it has no order of softmax and top-k",
            found="router.score=softmax without router.order",
            remedy="leave router.score out to go on with sigmoids, or set router.order",
        )
    if not sigmoid and router.renormalise is False:
        raise ConfigError(
            "router.renormalise is for sigmoid scores, and these are softmax",
            found="router.renormalise=false",
            remedy="set router.order=softmax_topk for weights that are not renormalised",
        )


def _check_experts(moe: MoeDescription, router: RouterConfig) -> None:
    if not 1 <= moe.top_k <= moe.experts:
        raise ConfigError(
            "top_k must be between 1 and the number of experts",
            found=f"top_k={moe.top_k} of {moe.experts} experts",
        )
    if moe.limits[0] > moe.limits[1]:
        raise ConfigError(
            "the checkpoint chooses a token's experts from some groups of neighbours, which training does not do",
            found=f"n_group={moe.limits[0]}, topk_group={moe.limits[1]} in config.json",
            expected="n_group=1, or topk_group=n_group",
            remedy="set n_group and topk_group to 1 in config.json to choose among all experts from now on",
        )
    _check_ways(moe, router.release.then if router.release else None)


def _check_ways(moe: MoeDescription, then: str | None) -> None:
    """Check how experts of virtual groups are chosen, and how after a release.

    Raises:
        ConfigError: the shape has no groups, or there is nothing to release.
    """
    for groups in {moe.groups, then} - {"free", None}:
        check_divisible(str(groups), granularity=moe.granularity, top_k=moe.top_k, experts=moe.experts)
    if then is not None and (moe.groups == "free" or then not in AFTER_RELEASE or then == moe.groups):
        raise ConfigError(
            "router.release needs groups that hold until then, and another way to choose afterwards",
            found=f"moe.groups={moe.groups}, then {then}",
            expected="moe.groups=tied, whole or positions, then " + " or ".join(AFTER_RELEASE),
            remedy="set router.release=null to keep one way",
        )


def _check_expert_choice(moe: MoeDescription, router: RouterConfig, balance: BalanceConfig) -> None:
    idle = [name for name in ("aux_loss", "bias_update") if getattr(balance, name) != 0]
    given = [f"balance.{name}={getattr(balance, name)}" for name in idle]
    ways = {moe.groups, router.release.then if router.release else moe.groups}
    given += [f"moe.groups={way}" for way in ("whole", "positions") if way in ways]
    if given:
        raise ConfigError(
            "experts that choose tokens are equally loaded and choose one by one",
            found=f"router.expert_choice=true with {', '.join(given)}",
            remedy="leave these out (moe.groups=tied or free for groups), or set router.expert_choice=false",
        )
