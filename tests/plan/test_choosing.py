"""How experts of virtual groups are chosen: what `auto` becomes, what is said of training, what is refused."""

from __future__ import annotations

import pytest
from conversions import described, options, planned

from upcycle.errors import ConfigError, TargetError
from upcycle.plan.request import moe_shape


@pytest.mark.parametrize(
    ("name", "changes", "target", "groups"),
    [
        ("llama", {}, "qwen2_moe", "tied"),
        ("llama", {"router_order": "topk_softmax"}, "mixtral", "tied"),
        ("llama", {"target": "upcycled_moe"}, "upcycled_moe", "positions"),
        ("gemma2", {}, "upcycled_moe", "positions"),
        ("llama", {"granularity": 1}, "qwen2_moe", "free"),
        ("llama", {"init": "drop"}, "qwen2_moe", "tied"),
        ("llama", {"init": "copy"}, "qwen2_moe", "free"),
        ("llama", {"init": "copy", "target": "upcycled_moe"}, "upcycled_moe", "positions"),
        ("llama", {"init": "random", "target": "upcycled_moe"}, "upcycled_moe", "free"),
        ("llama", {"init": "copy", "top_k": 3, "target": "upcycled_moe"}, "upcycled_moe", "free"),
        ("llama", {"groups": "positions"}, "upcycled_moe", "positions"),
        ("llama", {"groups": "whole"}, "upcycled_moe", "whole"),
        ("llama", {"groups": "free"}, "qwen2_moe", "free"),
        ("llama", {"groups": "tied", "target": "upcycled_moe"}, "upcycled_moe", "tied"),
    ],
)
def test_what_is_chosen_and_what_stores_it(name, changes, target, groups):
    plan = planned(described(name), **changes)
    assert (plan.target, plan.moe.groups) == (target, groups)
    assert plan.config.get("groups") == (groups if target == "upcycled_moe" else None)


def test_the_plan_says_what_training_does_to_groups():
    def said(**changes):
        return " ".join(note for note in planned(described("llama"), **changes).notes if "moe.groups" in note)

    assert "the router rows of a group stay equal" in said()
    assert "come apart within some ten steps" in said(groups="free")
    assert "every token gets every shard" in said(groups="positions")
    assert "chosen as wholes" in said(groups="whole")
    assert said(granularity=1) == ""


@pytest.mark.parametrize(
    ("changes", "constant"),
    [
        ({"router_order": "topk_softmax"}, True),
        ({"router_order": "topk_softmax", "top_k": 4}, False),
        ({"router_order": "topk_softmax", "groups": "free"}, False),
        ({}, False),
    ],
)
def test_a_router_without_a_gradient_is_said(changes, constant):
    notes = planned(described("llama"), **changes).notes
    assert any("no gradient from the language model" in note for note in notes) == constant


@pytest.mark.parametrize("groups", ["whole", "positions"])
@pytest.mark.parametrize("target", ["qwen2_moe", "qwen3_moe", "olmoe", "flex_olmo"])
def test_native_types_take_plain_top_k(groups, target):
    with pytest.raises(TargetError) as raised:
        planned(described("llama"), groups=groups, target=target)
    said = str(raised.value)
    assert f"moe.groups is {groups}, it can express tied (the router rows of a group stay equal" in said
    assert "a type that can: upcycled_moe" in said


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"groups": "positons"}, "unknown value for moe.groups(.|\n)*did you mean positions"),
        ({"groups": "tied", "granularity": 1}, "moe.groups=tied needs virtual groups, and there are none"),
        (
            {"groups": "whole", "init": "copy", "top_k": 3},
            "moe.groups=whole needs a top_k(.|\n)*set moe.top_k to 2 or 4",
        ),
        ({"groups": "positions", "top_k": 3}, "moe.top_k would break virtual groups"),
        ({"groups": "tied", "init": "copy"}, "init=copy draws each anew(.|\n)*moe.groups=positions"),
    ],
)
def test_refused(changes, says):
    request = options("source", "output", **changes)
    with pytest.raises(ConfigError, match=says):
        moe_shape(request.moe, request.init, ffn_width=96, hidden_size=32, layers=range(6))
