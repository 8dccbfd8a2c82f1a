"""Weight scaling against closed forms (arXiv 2410.07524 section 4.2), without a model."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.activations import ACT2FN

from upcycle.arch.moe import MoeShape
from upcycle.plan.scaling import degree, expected_mass, layer_scaling, lossless

ACTIVATIONS = ["silu", "gelu", "gelu_new", "relu", "relu2", "gelu_pytorch_tanh"]
MASSES = st.floats(min_value=1e-3, max_value=1.0)
GRANULARITIES = st.integers(min_value=1, max_value=64)


def shape(order, *, expansion=8, granularity=8, top_k=8):
    sizes = {"expansion": expansion, "granularity": granularity, "top_k": top_k}
    return MoeShape(
        **sizes, router_order=order, shared="copies", shared_width=0, expert_width=1, layers=(0,), groups="free"
    )


@pytest.mark.parametrize(
    ("expansion", "granularity", "top_k", "softmax_topk", "topk_softmax"),
    [(8, 8, 8, 64, 8), (8, 1, 1, 8, 1), (8, 1, 2, 4, 1), (4, 2, 2, 8, 2), (8, 8, 16, 32, 8), (1, 4, 4, 4, 4)],
)
def test_factor_is_that_of_the_paper(expansion, granularity, top_k, softmax_topk, topk_softmax):
    """E*G^2/T for softmax-then-topK, G for topK-then-softmax."""
    for order, factor in (("softmax_topk", softmax_topk), ("topk_softmax", topk_softmax)):
        moe = shape(order, expansion=expansion, granularity=granularity, top_k=top_k)
        found = layer_scaling("exact", mass=expected_mass(moe), granularity=granularity, activation="silu", gated=True)
        assert found.output == pytest.approx(factor)


@pytest.mark.parametrize("name", ["exact", "down"])
@given(mass=MASSES, granularity=GRANULARITIES, activation=st.sampled_from(ACTIVATIONS), gated=st.booleans())
def test_exact_and_down_multiply_the_ffn_by_the_factor(name, mass, granularity, activation, gated):
    """On a random FFN in float64, biases included, for every activation with and without a gate."""
    scaling = layer_scaling(name, mass=mass, granularity=granularity, activation=activation, gated=gated)
    assert scaling.output == pytest.approx(granularity / mass)
    assert lossless(name, mass=mass, granularity=granularity, activation=activation, gated=gated)
    assert_multiplies(scaling, activation, gated)


@given(mass=MASSES, granularity=GRANULARITIES, activation=st.sampled_from(ACTIVATIONS), gated=st.booleans())
def test_down_scales_no_other_matrix(mass, granularity, activation, gated):
    scaling = layer_scaling("down", mass=mass, granularity=granularity, activation=activation, gated=gated)
    others = {role: factor for role, factor in scaling.matrix.items() if role != "down"}
    assert set(others) == ({"up", "gate"} if gated else {"up"})
    assert set(others.values()) == {1.0}
    assert scaling.bias["up"] == 1.0


@pytest.mark.parametrize(("factor", "same"), [(2.0, True), (16.0, False)])
def test_exact_is_down_for_a_factor_of_two(factor, same):
    """Why sweeps/router_order.yaml has no arm of `down` with topK-then-softmax, whose factor at G = 2 is 2."""
    rule = {"mass": 2 / factor, "granularity": 2, "activation": "silu", "gated": True}
    assert (layer_scaling("exact", **rule) == layer_scaling("down", **rule)) == same


@given(mass=MASSES, granularity=GRANULARITIES, activation=st.sampled_from(ACTIVATIONS), gated=st.booleans())
def test_paper_multiplies_by_the_factor_where_it_says_so(mass, granularity, activation, gated):
    rule = {"mass": mass, "granularity": granularity, "activation": activation, "gated": gated}
    scaling = layer_scaling("paper", **rule)
    assert set(scaling.matrix.values()) == {math.cbrt(scaling.output)}
    if lossless("paper", **rule):
        assert_multiplies(scaling, activation, gated)
    elif scaling.output > 1.1:
        with pytest.raises(AssertionError):
            assert_multiplies(scaling, activation, gated)


def assert_multiplies(scaling, activation, gated):
    """FFN with scaled matrices and biases = output * FFN without down bias + the scaled down bias."""
    generator = torch.Generator().manual_seed(0)
    x, up, gate, down = (torch.randn(6, 6, generator=generator, dtype=torch.float64) for _ in range(4))
    up_bias, gate_bias = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    act = ACT2FN[activation]

    def ffn(factors, biases):
        h = x @ up * factors["up"] + up_bias * biases["up"]
        h = act(x @ gate * factors["gate"] + gate_bias * biases["gate"]) * h if gated else act(h)
        return h @ down * factors["down"]

    ones = {"gate": 1.0, "up": 1.0, "down": 1.0}
    expected = scaling.output * ffn(ones, ones)
    torch.testing.assert_close(ffn(scaling.matrix, scaling.bias), expected, rtol=1e-9, atol=1e-9)


@given(mass=MASSES, granularity=GRANULARITIES)
def test_down_bias_of_all_selected_experts_adds_up_to_one(mass, granularity):
    """Every selected expert adds the down bias, weighted: with weights that add up to `mass`, that must be one bias."""
    for rule in ("exact", "paper", "down", "calibrated"):
        scaling = layer_scaling(rule, mass=mass, granularity=granularity, activation="gelu", gated=False)
        assert scaling.bias["down"] * mass == pytest.approx(1.0)


@given(exponent=st.integers(min_value=-3, max_value=12), activation=st.sampled_from(ACTIVATIONS), gated=st.booleans())
def test_powers_of_two_stay_powers_of_two(exponent, activation, gated):
    scaling = layer_scaling(2.0**exponent, mass=1.0, granularity=1, activation=activation, gated=gated)
    assert all(math.frexp(factor)[0] == 0.5 for factor in scaling.matrix.values())


def test_factor_is_shared_between_up_and_down():
    """32 = 4 * 8 for SwiGLU, 2^2 * 8 for squared ReLU, 1 * 32 for GELU."""
    rule = {"mass": 1.0, "granularity": 1}
    gated = layer_scaling(32, activation="silu", gated=True, **rule)
    assert gated.matrix == {"gate": 1.0, "up": 4.0, "down": 8.0}
    assert layer_scaling(32, activation="relu2", gated=False, **rule).matrix == {"up": 2.0, "down": 8.0}
    assert layer_scaling(32, activation="gelu", gated=False, **rule).matrix == {"up": 1.0, "down": 32.0}


@pytest.mark.parametrize("number", [3, 3.0, 0.25])
def test_a_number_is_the_factor(number):
    rule = {"mass": 0.5, "granularity": 2, "activation": "silu", "gated": True}
    assert layer_scaling(number, **rule).output == number
    assert not lossless(number, **rule)
    assert lossless(4, **rule)


def test_none_scales_nothing():
    rule = {"mass": 0.5, "granularity": 2, "activation": "silu", "gated": True}
    assert set(layer_scaling("none", **rule).matrix.values()) == {1.0}
    assert not lossless("none", **rule)
    assert lossless("none", **rule | {"mass": 1.0, "granularity": 1})


def test_degrees():
    assert degree("silu", gated=True) == degree("relu", gated=False) == 1
    assert degree("relu2", gated=False) == 2
    assert degree("gelu", gated=False) == 0
