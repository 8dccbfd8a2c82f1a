"""Options of older records, in today's words, and today's as the first records have them."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest

from upcycle.tracking.versions import recorded, upgraded


def options(model: str = "upcycle", *, granularity: int = 2, **more: Any) -> dict[str, Any]:
    """What was recorded before `moe.groups`."""
    router = {"score": None, "select_groups": more.get("select_groups")}
    moe = {"granularity": granularity, "top_k": 2, "router_order": "softmax_topk"}
    balance, init = {"aux_loss": 0.01}, {"name": "virtual_group"}
    return {"model": model, "moe": moe, "init": init, "router": router, "balance": balance, "seed": 0}


@pytest.mark.parametrize(
    ("before", "groups"),
    [
        (options(), "free"),
        (options("scratch"), "free"),
        (options(granularity=1), "auto"),
        (options("dense"), "auto"),
        (options("checkpoint"), "auto"),
        (options(select_groups=False), "free"),
        (options(select_groups=True), "whole"),
    ],
)
def test_older_records_in_todays_words(before: dict[str, Any], groups: str) -> None:
    kept = deepcopy(before)
    now = upgraded(before)
    assert now["moe"]["groups"] == groups
    assert now["router"] == {"score": None, "release": None}
    assert before == kept
    assert upgraded(now) == now


@pytest.mark.parametrize("model", ["upcycle", "scratch", "dense", "checkpoint"])
@pytest.mark.parametrize("granularity", [1, 2])
def test_a_run_of_then_and_the_same_of_today_are_one(model: str, granularity: int) -> None:
    before = options(model, granularity=granularity)
    assert recorded(upgraded(before)) == before


def test_auto_is_what_was_the_default_then() -> None:
    now = upgraded(options())
    auto = {**now, "moe": {**now["moe"], "router_order": "auto"}}
    assert recorded(auto) == recorded(now)
    assert recorded({**now, "moe": {**now["moe"], "router_order": "topk_softmax"}}) != recorded(now)


def test_what_differs_stays_different() -> None:
    now = upgraded(options())
    for groups in ("auto", "tied", "whole", "positions"):
        assert recorded({**now, "moe": {**now["moe"], "groups": groups}}) != recorded(now)
    for group, name, value in (("moe", "shared_neurons", 8), ("moe", "latent", 8), ("init", "latent", "compress")):
        assert recorded({**now, group: {**now[group], name: value}}) != recorded(now)
    released = {**now, "router": {**now["router"], "release": {"until": 0.3, "then": "free"}}}
    assert recorded(released) != recorded(now)
    checkpoint = upgraded(options("checkpoint"))
    assert recorded({**checkpoint, "moe": {**checkpoint["moe"], "groups": "free"}}) != recorded(checkpoint)
