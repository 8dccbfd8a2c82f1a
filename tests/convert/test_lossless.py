"""Step 0: what a converted checkpoint computes in plain transformers against the dense model."""

from __future__ import annotations

import conversions
import models
import pytest
from conversions import ROUTER_ORDERS, TOLERANCE, assert_lossless, gap, options

LOSSLESS = {
    "virtual_group": {},
    "copy": {"init": "copy", "granularity": 1, "top_k": 1},
    "two_copies": {"init": "copy", "granularity": 1, "top_k": 2},
    "drop_nothing": {"init": "drop", "ratio": 0.0},
    "noise_nothing": {"init": "noise", "std": 0.0},
    "not_a_power_of_two": {"expansion": 3, "granularity": 3, "top_k": 3},
    "two_groups": {"top_k": 4},
    "one_shared_shard": {"shared_experts": 1},
    "one_shared_ffn": {"shared_experts": 2},
    "more_than_one_shared_ffn": {"shared_experts": 3},
    "two_groups_and_shared": {"top_k": 4, "shared_experts": 1},
    "every_2": {"layers": "every_2"},
    "first_layer": {"layers": [0]},
    "whole": {"top_k": 4, "groups": "whole"},
    "positions": {"top_k": 4, "groups": "positions"},
    "positions_and_shared": {"groups": "positions", "shared_experts": 1},
    "copies_by_position": {"init": "copy", "top_k": 4, "groups": "positions"},
}
LOSSY = {
    "drop": {"init": "drop", "ratio": 0.5},
    "drop_independent": {"init": "drop", "ratio": 0.5, "neurons": "independent"},
    "noise": {"init": "noise", "std": 0.1},
    "random": {"init": "random", "scaling": "none", "std": 0.02},
    "copy_of_shards": {"init": "copy", "granularity": 2, "groups": "free"},
    "no_scaling": {"scaling": "none"},
    "another_factor": {"scaling": 3},
}
# Every request for one model of each family, and the two that touch most for every other option.
OTHERS = [name for name in models.MODELS if name not in models.ONE_PER_FAMILY]
PAIRS = [(name, asked) for name in models.ONE_PER_FAMILY for asked in LOSSLESS]
PAIRS += [(name, asked) for name in OTHERS for asked in ("virtual_group", "more_than_one_shared_ffn", "first_layer")]
FAR = 0.1  # a lossy request moves logits of order 1 by at least this


def convert_native_and_generic(source, output, **changes):
    """The conversions to the best type and to `upcycled_moe`, which may be the same one."""
    done = conversions.run(options(source, output / "auto", **changes))
    yield done
    if done.plan.target != "upcycled_moe":
        yield conversions.run(options(source, output / "generic", target="upcycled_moe", **changes))


@pytest.mark.parametrize("order", ROUTER_ORDERS)
@pytest.mark.parametrize(("name", "asked"), PAIRS)
def test_lossless_request_computes_what_the_dense_model_computes(name, asked, order, dense, dense_outputs, tmp_path):
    for done in convert_native_and_generic(dense(name), tmp_path, router_order=order, **LOSSLESS[asked]):
        assert done.plan.losses == ()
        assert_lossless(done.directory, dense_outputs(name), TOLERANCE[order])


@pytest.mark.parametrize("order", ROUTER_ORDERS)
@pytest.mark.parametrize("asked", LOSSY)
@pytest.mark.parametrize("name", models.ONE_PER_FAMILY)
def test_lossy_request_says_so_and_differs(name, asked, order, dense, dense_outputs, tmp_path):
    for done in convert_native_and_generic(dense(name), tmp_path, router_order=order, **LOSSY[asked]):
        assert done.plan.losses
        assert gap(done.directory, dense_outputs(name)) > FAR


@pytest.mark.parametrize("name", ["llama", "nemotron_biases", "gpt2"])
def test_softmax_over_all_selected_experts_leaves_nothing(name, dense, dense_outputs, tmp_path):
    """With every expert active the router's weights add up to 1, so even softmax-then-topK is exact."""
    done = conversions.run(options(dense(name), tmp_path / "moe", top_k=8, router_std=0.5))
    assert_lossless(done.directory, dense_outputs(name), TOLERANCE["topk_softmax"])


@pytest.mark.parametrize("name", models.ONE_PER_FAMILY)
def test_by_position_it_is_exact_without_ties(name, dense, dense_outputs, tmp_path):
    """Whatever the rows: each expert has a wide one of its own. Chosen one by one, the same experts lose the FFN."""
    changes = {"init": "copy", "router_order": "topk_softmax", "top_k": 4, "router_std": 0.5, "target": "upcycled_moe"}
    done = conversions.run(options(dense(name), tmp_path / "positions", groups="positions", **changes))
    assert_lossless(done.directory, dense_outputs(name), TOLERANCE["topk_softmax"])
    mutant = conversions.run(options(dense(name), tmp_path / "free", groups="free", **changes))
    assert gap(mutant.directory, dense_outputs(name)) > FAR


@pytest.mark.parametrize("std", [0.5, 0.02])
def test_topk_softmax_is_exact_whatever_the_router(std, dense, dense_outputs, tmp_path):
    changes = {"router_order": "topk_softmax", "router_std": std, "top_k": 4}
    done = conversions.run(options(dense("llama"), tmp_path / "moe", **changes))
    assert_lossless(done.directory, dense_outputs("llama"), TOLERANCE["topk_softmax"])
