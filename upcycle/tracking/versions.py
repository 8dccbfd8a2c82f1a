"""Options that came or went while records of runs were kept: what an older record says in today's words."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

# Options that came later, and what all did before: group ("" for none), name -> value.
LATER: dict[tuple[str, str], Any] = {
    ("", "objective"): "causal_lm",
    ("", "mtp"): {"start": "none", "depths": 2, "weight": 0.3},
    ("", "quantise"): {
        "sites": ["ffn", "experts", "shared"],
        **{"first": 0, "last": 0, "stochastic": None, "hadamard": None, "squares": None, "rest": "bfloat16"},
    },
    ("data", "attributes"): None,
    ("router", "release"): None,
    ("moe", "shared_neurons"): None,
    ("moe", "latent"): None,
    ("init", "latent"): "exact",
    ("balance", "bias_per"): "group",
}


def upgraded(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a recorded run with today's names; those of today stay as they are.

    Before `moe.groups`, experts were chosen one by one unless `router.select_groups` was true.
    """
    now = deepcopy(dict(options))
    if not {"model", "moe", "router", "balance"} <= now.keys():
        return now  # damaged, which whoever needs them will say
    whole = now["router"].pop("select_groups", None)
    now["moe"].setdefault("groups", "whole" if whole else "free" if _has_groups(now) else "auto")
    for (group, name), before in LATER.items():
        _group(now, group).setdefault(name, before)
    return now


def recorded(options: Mapping[str, Any]) -> dict[str, Any]:
    """Today's options as the first records have them: what tells two runs apart, whenever they were made.

    They know no `moe.router_order=auto`: it is the softmax_topk of their families, which have no mixtures of their own.
    """
    then = deepcopy(dict(options))
    if not _has_groups(then) or (then["moe"]["groups"] == "free" and then["model"] != "checkpoint"):
        del then["moe"]["groups"]
    if then["moe"]["router_order"] == "auto":
        then["moe"]["router_order"] = "softmax_topk"
    for (group, name), before in LATER.items():
        if _group(then, group).get(name) == before:
            _group(then, group).pop(name, None)
    then["router"]["select_groups"] = None
    return then


def _group(options: dict[str, Any], name: str) -> dict[str, Any]:
    """A group of options, or all of them; one that is not there is empty."""
    group: dict[str, Any] = options.get(name, {}) if name else options
    return group


def _has_groups(options: Mapping[str, Any]) -> bool:
    """Whether something depends on `moe.groups`: a checkpoint says itself how to choose, unless a way is named."""
    if options["model"] == "checkpoint":
        return bool(options["moe"].get("groups", "auto") != "auto")
    return bool(options["model"] != "dense" and options["moe"]["granularity"] > 1)
