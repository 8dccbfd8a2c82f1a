"""What a checkpoint and the options say together about choosing experts. Knows `modeling`, and no model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from upcycle.modeling.selection_upcycled_moe import ExpertSelection

if TYPE_CHECKING:
    from upcycle.models.moe import MoeDescription
    from upcycle.routing.config import RouterConfig

# These take the softmax of the kept logits; the other types divide the kept probabilities by their sum, which is the
# same up to rounding.
SOFTMAX_OF_KEPT = ("granitemoeshared", "upcycled_moe")


def native_selection(moe: MoeDescription) -> ExpertSelection:
    """How the routers of a native type choose experts."""
    if moe.router_order != "sigmoid_topk":
        return ExpertSelection(top_k=moe.top_k, granularity=moe.granularity, **_softmax(moe, moe.router_order))
    return ExpertSelection(
        top_k=moe.top_k,
        granularity=moe.granularity,
        order="sigmoid_topk",
        renormalise=moe.renormalise,
        scaling_factor=moe.scaling_factor,
    )


def selection_changes(moe: MoeDescription, router: RouterConfig) -> dict[str, Any]:
    """The fields of `ExpertSelection` that the options set; the checkpoint keeps the others."""
    changes: dict[str, Any] = {"groups": moe.groups}
    if router.order is not None:
        changes |= _softmax(moe, router.order)
    if router.score == "sigmoid" and moe.router_order != "sigmoid_topk":
        changes |= {"order": "sigmoid_topk", "renormalise": True}
    if router.score != "softmax" and router.renormalise is not None:
        changes["renormalise"] = router.renormalise
    if router.scaling_factor is not None:
        changes["scaling_factor"] = router.scaling_factor
    return changes


def _softmax(moe: MoeDescription, order: str) -> dict[str, Any]:
    if order == "topk_softmax" and moe.model_type not in SOFTMAX_OF_KEPT:
        return {"order": "softmax_topk", "renormalise": True}
    return {"order": order, "renormalise": False}
