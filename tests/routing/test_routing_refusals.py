"""Options that cannot work are refused before anything is installed, with the option named."""

from __future__ import annotations

import pytest
from pydantic import TypeAdapter, ValidationError
from routers import description

from upcycle.errors import ConfigError
from upcycle.routing.check import check_routing
from upcycle.routing.config import BalanceConfig, Release, RouterConfig, Schedule

POSITIONS_LATER = Release(until=0.3, then="positions")
SIGMOID = {"router_order": "sigmoid_topk"}
REFUSED = [
    ({"score": "sofmax"}, {}, {}, "unknown router.score(.|\n)*did you mean softmax"),
    ({"order": "topk_sigmoid"}, {}, {}, "unknown router.order"),
    ({}, {"statistics": "batch"}, {}, "unknown balance.statistics"),
    ({"capacity_factor": 0.0}, {}, {}, "router.capacity_factor must be positive(.|\n)*null for dropless"),
    ({"capacity_factor": -1.0}, {}, {}, "router.capacity_factor must be positive"),
    ({"capacity_factor": float("nan")}, {}, {}, "router.capacity_factor must be positive"),
    ({"scaling_factor": 0.0}, {}, {}, "router.scaling_factor must be positive"),
    ({"jitter": 1.0}, {}, {}, "router.jitter is out of range"),
    ({"jitter": -0.1}, {}, {}, "router.jitter is out of range"),
    ({}, {"aux_loss": -0.1}, {}, "balance.aux_loss must not be negative"),
    ({}, {"z_loss": Schedule(start=0.1, end=-0.1, steps=5)}, {}, "balance.z_loss must not be negative"),
    ({}, {"bias_update": Schedule(start=0.1, end=0.0, steps=0)}, {}, "balance.bias_update.steps"),
    ({"score": "sigmoid", "order": "softmax_topk"}, {}, {}, "router.order is for softmax scores"),
    ({"order": "softmax_topk"}, {}, SIGMOID, "router.order is for softmax scores"),
    ({"score": "softmax"}, {}, SIGMOID, "the checkpoint's scores are sigmoids"),
    ({"renormalise": False}, {}, {}, "router.renormalise is for sigmoid scores"),
    ({}, {}, {"top_k": 9}, "top_k must be between 1 and the number of experts(.|\n)*top_k=9 of 8"),
    ({}, {}, {"groups": "whole", "top_k": 3}, "moe.groups=whole needs a top_k(.|\n)*set moe.top_k to 2 or 4"),
    (
        {},
        {},
        {"groups": "positions", "granularity": 1},
        "moe.groups=positions needs virtual groups, and there are none",
    ),
    ({}, {}, {"groups": "tied", "granularity": 3}, "moe.groups=tied needs virtual groups"),
    ({}, {}, SIGMOID | {"limits": (4, 2)}, "some groups of neighbours(.|\n)*n_group=4, topk_group=2"),
    ({"release": Release(until=1.0, then="free")}, {}, {"groups": "tied"}, "release.until is outside the budget"),
    ({"release": Release(until=0.0, then="free")}, {}, {"groups": "tied"}, "release.until is outside the budget"),
    ({"release": Release(until=0.3, then="free")}, {}, {}, "router.release needs groups that hold until then"),
    ({"release": Release(until=0.3, then="whole")}, {}, {"groups": "tied"}, "then free or positions"),
    ({"release": POSITIONS_LATER}, {}, {"groups": "positions"}, "another way to choose afterwards"),
    ({"expert_choice": True, "release": POSITIONS_LATER}, {}, {"groups": "tied"}, "true with moe.groups=positions"),
    ({"expert_choice": True}, {"bias_update": 0.1}, {}, "expert_choice=true with balance.bias_update=0.1"),
    ({"expert_choice": True}, {"aux_loss": 0.1}, {}, "expert_choice=true with balance.aux_loss=0.1"),
    ({"expert_choice": True}, {}, {"groups": "whole"}, "expert_choice=true with moe.groups=whole(.|\n)*tied or free"),
    ({"expert_choice": True}, {}, {"groups": "positions"}, "expert_choice=true with moe.groups=positions"),
]
ACCEPTED = [
    ({}, {}, {}),
    ({"score": "softmax", "renormalise": True, "scaling_factor": 1.0}, {}, {}),
    ({"score": "sigmoid", "renormalise": False}, {"bias_update": 1e-3}, {}),
    ({"renormalise": False, "scaling_factor": 2.5}, {}, SIGMOID),
    ({}, {}, SIGMOID | {"limits": (4, 4)}),
    ({"score": "softmax", "order": "topk_softmax"}, {}, SIGMOID),
    ({"capacity_factor": 1.25}, {"aux_loss": 0.01, "statistics": "global_batch"}, {"groups": "whole"}),
    ({"expert_choice": True}, {}, {"groups": "tied"}),
    ({"release": POSITIONS_LATER}, {}, {"groups": "tied"}),
    ({"expert_choice": True, "capacity_factor": 2.0}, {"z_loss": Schedule(start=0.0, end=1e-3, steps=1)}, {}),
]


@pytest.mark.parametrize(("router", "balance", "moe", "message"), REFUSED)
def test_refused(router, balance, moe, message):
    with pytest.raises(ConfigError, match=message):
        check_routing(description(**moe), RouterConfig(**router), BalanceConfig(**balance))


@pytest.mark.parametrize(("router", "balance", "moe"), ACCEPTED)
def test_accepted(router, balance, moe):
    check_routing(description(**moe), RouterConfig(**router), BalanceConfig(**balance))


def test_options_are_typed():
    made = TypeAdapter(BalanceConfig).validate_python({"aux_loss": {"start": 0.1, "end": 0, "steps": 5}, "z_loss": 1})
    assert made == BalanceConfig(aux_loss=Schedule(start=0.1, end=0.0, steps=5), z_loss=1.0)
    for wrong in ({"aux_los": 0.1}, {"aux_loss": {"start": 0.1, "end": 0.0}}):
        with pytest.raises(ValidationError):
            TypeAdapter(BalanceConfig).validate_python(wrong)
    with pytest.raises(ValidationError):
        TypeAdapter(RouterConfig).validate_python({"top_k": 2})
