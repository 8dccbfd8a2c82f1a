"""Requests that cannot work are refused with what was found and the nearest values that work."""

from __future__ import annotations

from dataclasses import replace

import pytest
from conversions import options
from hypothesis import given
from hypothesis import strategies as st

from upcycle.convert.prepare import parse_size
from upcycle.errors import ConfigError
from upcycle.plan.request import check_init, moe_layers, moe_shape

WIDTH, HIDDEN, LAYERS = 96, 32, range(6)
SIGMOID = {"router_order": "sigmoid_topk"}


def shape(**changes):
    request = options("source", "output", **changes)
    return moe_shape(request.moe, request.init, ffn_width=WIDTH, hidden_size=HIDDEN, layers=LAYERS)


@pytest.mark.parametrize(
    ("changes", "found", "remedy"),
    [
        ({"granularity": 5}, "d_ff 96 % granularity 5 = 1", "set moe.granularity to 4 or 6"),
        ({"granularity": 7, "top_k": 7}, "d_ff 96 % granularity 7 = 5", "set moe.granularity to 6 or 8"),
        ({"granularity": 200, "top_k": 200}, "d_ff 96 % granularity 200 = 96", "set moe.granularity to 96"),
        ({"granularity": 8, "top_k": 12}, "top_k 12 % granularity 8 = 4", "set moe.top_k to 8 or 16"),
        ({"granularity": 8, "top_k": 2}, "top_k 2 % granularity 8 = 2", "set moe.top_k to 8, or take init=copy"),
        ({"granularity": 2, "top_k": 10}, "top_k 10 of 8 experts (E 4 * G 2)", "set moe.top_k to 8 or less"),
        ({"expansion": 2.5}, "expansion 2.5 * granularity 2 = 5 experts", "set moe.expansion to 2 or 3"),
        ({"expansion": 0.5}, "expansion 0.5 * granularity 2 = 1 experts", "set moe.expansion to 1"),
        ({"router_order": "softmax"}, "softmax", "did you mean"),
        ({"granularity": 8, "top_k": 6, **SIGMOID}, "top_k 6 % granularity 8 = 6", "set moe.top_k to 8, or take"),
        ({"expansion": 2.5, **SIGMOID}, "expansion 2.5 * granularity 2 = 5 experts", "set moe.expansion to 2 or 3"),
        ({"top_k": 1, "granularity": 1, **SIGMOID}, "moe.router_order=sigmoid_topk, moe.top_k=1", "set moe.top_k to 2"),
        (
            {"top_k": 1, "granularity": 1, "expansion": 1, **SIGMOID},
            "moe.router_order=sig",
            "set moe.router_order=soft",
        ),
        ({"shared_neurons": 1}, "d_ff 96 - shared_neurons 1 % granularity 2 = 1", "set moe.granularity to 1 or 5"),
        (
            {"shared_neurons": 6, "granularity": 4, "top_k": 4},
            "d_ff 96 - shared_neurons 6 % granularity 4 = 2",
            "set moe.granularity to 3 or 5",
        ),
    ],
)
def test_impossible_shape_names_the_nearest(changes, found, remedy):
    with pytest.raises(ConfigError) as raised:
        shape(**changes)
    assert f"found:    {found}" in str(raised.value)
    assert f"remedy:   {remedy}" in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "option"),
    [
        ({"granularity": 0}, "moe.granularity"),
        ({"top_k": 0}, "moe.top_k"),
        ({"expansion": 0}, "moe.expansion"),
        ({"expansion": -1}, "moe.expansion"),
        ({"shared_experts": -1}, "moe.shared_experts"),
        ({"shared_neurons": 0}, "moe.shared_neurons"),
        ({"shared_neurons": -1}, "moe.shared_neurons"),
        ({"shared_neurons": 96}, "moe.shared_neurons"),
        ({"shared_neurons": 0.5}, "moe.shared_neurons"),
        ({"shared_neurons": True}, "moe.shared_neurons"),
        ({"shared_neurons": "some"}, "moe.shared_neurons"),
        ({"shared_neurons": "all", "shared_experts": 1}, "moe.shared_experts and moe.shared_neurons both"),
        ({"layers": "some"}, "moe.layers"),
        ({"layers": "every_0"}, "moe.layers"),
        ({"layers": "every_7"}, "moe.layers"),
        ({"layers": [6]}, "moe.layers"),
        ({"layers": [-1]}, "moe.layers"),
        ({"layers": []}, "moe.layers"),
        ({"layers": [0.5]}, "moe.layers"),
        ({"layers": None}, "moe.layers"),
    ],
)
def test_value_out_of_range_names_the_option(changes, option):
    with pytest.raises(ConfigError, match=option):
        shape(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "virtual_groups"}, "did you mean virtual_group"),
        ({"scaling": "exactly"}, "did you mean exact"),
        ({"scaling": 0}, "init.scaling is out of range"),
        ({"scaling": -1.5}, "init.scaling is out of range"),
        ({"scaling": float("inf")}, "init.scaling is out of range"),
        ({"scaling": float("nan")}, "init.scaling is out of range"),
        ({"scaling": True}, "init.scaling is out of range"),
        ({"scaling": None}, "init.scaling is out of range"),
        ({"router_std": -1e-3}, "init.router_std is out of range"),
        ({"router_std": float("nan")}, "init.router_std is out of range"),
        ({"router_std": float("inf")}, "init.router_std is out of range"),
        ({"std": -1.0}, "init.std is out of range"),
        ({"std": float("nan")}, "init.std is out of range"),
        ({"ratio": 1.5}, "init.ratio is out of range"),
        ({"fraction": -0.1}, "init.fraction is out of range"),
        ({"neurons": "coherrent"}, "did you mean coherent"),
    ],
)
def test_bad_init_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        check_init(replace(options("source", "output").init, **changes))


@pytest.mark.parametrize(
    ("asked", "layers"),
    [
        ("all", (0, 1, 2, 3, 4, 5)),
        ("every_1", (0, 1, 2, 3, 4, 5)),
        ("every_2", (1, 3, 5)),
        ("every_4", (3,)),
        ([4, 0, 4], (0, 4)),
    ],
)
def test_layers(asked, layers):
    assert moe_layers(asked, LAYERS) == layers
    among_others = [10 + 3 * layer for layer in LAYERS]
    assert moe_layers(asked, among_others) == tuple(among_others[layer] for layer in layers)


@given(
    st.integers(1, 8),
    st.integers(1, WIDTH),
    st.integers(1, 64),
    st.sampled_from(["virtual_group", "drop", "noise", "copy", "random"]),
)
def test_accepted_shapes_are_whole(expansion, granularity, top_k, init):
    """Whatever is accepted cuts evenly and takes whole groups; what is not would not."""
    grouped = init in ("virtual_group", "drop", "noise")
    possible = WIDTH % granularity == 0 and top_k <= expansion * granularity and not (grouped and top_k % granularity)
    try:
        moe = shape(expansion=expansion, granularity=granularity, top_k=top_k, init=init)
    except ConfigError:
        assert not possible
    else:
        assert possible
        assert moe.experts == expansion * granularity
        assert moe.name == f"E{expansion}G{granularity}T{top_k}"


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("1.5 kb", 1500), ("2GiB", 2**31), ("4KiB", 4096)],
)
def test_sizes(text, size):
    assert parse_size("max_shard_size", text) == size


@pytest.mark.parametrize("text", ["5", "GB", "-1GB", "0MB", "5TBB", "", None, 5])
def test_bad_sizes_are_refused(text):
    with pytest.raises(ConfigError, match="max_shard_size is not a size"):
        parse_size("max_shard_size", text)


def test_more_experts_than_any_router_is_meant_for():
    with pytest.raises(ConfigError, match="at most 65,536"):
        shape(expansion=10**9, granularity=1, top_k=1)
