"""What of routing is stored in config.json, by MoE type. Knows the options and what a MoE is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from upcycle.errors import ConfigError
from upcycle.routing.config import Schedule
from upcycle.routing.selection import selection_changes

if TYPE_CHECKING:
    from upcycle.models.moe import MoeDescription
    from upcycle.routing.config import BalanceConfig, RouterConfig


GENERIC = "convert with target=upcycled_moe"
REMEDIES = {"moe.groups": f"{GENERIC}, or train with moe.groups=tied, which keeps groups whole in every type"}


def export_fields(moe: MoeDescription, router: RouterConfig, balance: BalanceConfig) -> dict[str, Any]:
    """The fields of config.json that record how a trained model routes; those not named stay as they are.

    `router_aux_loss_coef` is the last coefficient over K, which makes transformers' loss as strong as ours was. What
    acts in training alone (capacity, jitter, noise, z-loss) is not stored: a checkpoint routes without any of it.

    Raises:
        ConfigError: the type cannot store the routing; names the option.
    """
    if router.expert_choice:
        raise ConfigError(
            "router.expert_choice=true cannot be stored in any type, because it is not causal",
            remedy="train with router.expert_choice=false for a checkpoint that can generate",
        )
    last = balance.aux_loss.end if isinstance(balance.aux_loss, Schedule) else balance.aux_loss
    stored = _generic_fields if moe.target.generic else _native_fields
    return {**stored(moe, router, balance), "router_aux_loss_coef": last / moe.top_k}


def _generic_fields(moe: MoeDescription, router: RouterConfig, balance: BalanceConfig) -> dict[str, Any]:
    names = {"order": "router_order", "renormalise": "router_renormalise", "scaling_factor": "routed_scaling_factor"}
    changes = selection_changes(moe, router)
    fields = {name: changes[field] for field, name in names.items() if field in changes}
    fields["groups"] = moe.groups
    if balance.bias_update != 0:
        fields["router_correction_bias"] = True
    return fields


def _native_fields(moe: MoeDescription, router: RouterConfig, balance: BalanceConfig) -> dict[str, Any]:
    target, orders = moe.target, moe.target.router_orders
    scores = {"sigmoid" if order == "sigmoid_topk" else "softmax" for order in orders}
    scaled = router.scaling_factor not in (None, 1.0)
    beyond = {
        "router.score": (router.score, router.score is not None and router.score not in scores),
        "router.order": (router.order, router.order is not None and router.order not in orders),
        "router.scaling_factor": (router.scaling_factor, scaled and target.scale_field is None),
        "moe.groups": (moe.groups, moe.groups in ("whole", "positions")),
        "balance.bias_update": (balance.bias_update, balance.bias_update != 0 and not target.layout.correction_bias),
    }
    for option, (value, impossible) in beyond.items():
        if impossible:
            raise ConfigError(
                f"{option}={value} cannot be stored in {moe.model_type}",
                remedy=REMEDIES.get(option, GENERIC),
            )
    fields: dict[str, Any] = {}
    if router.order is not None and "softmax_topk" in orders:
        fields["norm_topk_prob"] = router.order == "topk_softmax"
    if router.renormalise is not None and moe.router_order == "sigmoid_topk":
        fields["norm_topk_prob"] = router.renormalise
    if router.scaling_factor is not None and target.scale_field:
        fields[target.scale_field] = router.scaling_factor
    return fields
