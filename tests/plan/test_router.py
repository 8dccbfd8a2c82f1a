"""The router's standard deviation: its default, and when the plan stops calling a conversion lossless."""

from __future__ import annotations

import pytest
from conversions import described, planned

from upcycle.plan.experts import DEFAULT_SPREAD


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_by_default_it_falls_with_the_width(name):
    model = described(name)
    plan = planned(model, router_std=None)
    assert plan.router_std == DEFAULT_SPREAD / model.hidden_size**0.5
    assert not plan.losses


def test_smollm2_gets_what_was_measured():
    assert planned(described("llama", hidden_size=576), router_std=None).router_std == pytest.approx(0.0005, rel=1e-12)


@pytest.mark.parametrize(
    ("changes", "lossless"),
    [
        ({"router_std": 0.02}, False),
        ({"router_std": 0.02, "scaling": "calibrated"}, False),
        ({"router_std": 0.02, "top_k": 8}, True),
        ({"router_std": 0.02, "router_order": "topk_softmax"}, True),
        ({"router_std": 0.001}, True),
    ],
)
def test_a_wide_router_is_not_lossless(changes, lossless):
    losses = planned(described("llama"), **changes).losses
    assert (not losses) is lossless
    assert lossless or "init.router_std=0.02" in losses[0]
