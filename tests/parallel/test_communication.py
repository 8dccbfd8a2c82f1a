"""Communication by hand for Mixtral 8x22B with TP2 EP8 PP8, and what it depends on."""

from __future__ import annotations

from dataclasses import replace

import pytest
from published import RUNS, workload

from upcycle.parallel.communication import KINDS, communication
from upcycle.parallel.folding import Folding
from upcycle.parallel.step import Step

BEST = next(run for run in RUNS if run.model == "Mixtral 8x22B" and run.best)
STEP = BEST.request(BEST.folding).step()
LAYERS, MICRO, TOKENS, HIDDEN, BYTES = 7, 32, 4096 // 2, 6144, 2


def sent(step: Step) -> dict[tuple[str, str], float]:
    return {(each.kind, each.purpose): each.nbytes for each in communication(step)}


def change(**changes: int) -> Step:
    return replace(STEP, layout=replace(STEP.layout, **changes))


def test_by_hand():
    """2504.14960: forward 2*T*K*H*bytes, doubled with backward, of which (EP-1)/EP leave the rank."""
    found, steps = sent(STEP), LAYERS * MICRO
    activations = steps * TOKENS * HIDDEN * BYTES
    assert found["all-to-all", "tokens to experts and back"] == 4 * 2 * activations * 7 / 8
    assert found["all-gather", "activations within TP"] == 3 * activations
    assert found["reduce-scatter", "activations within TP"] == 2 * activations
    assert found["pipeline", "activations between stages"] == 2 * activations
    experts = LAYERS * 3 * HIDDEN * 16384
    assert found["all-gather", "expert weights"] == 2 * experts / 2
    assert found["reduce-scatter", "expert gradients"] == 4 * experts / 2
    assert {kind for kind, _ in found} == set(KINDS)


def test_a_single_gpu_sends_nothing():
    layout = Folding(engine="megatron", tp=1, dp=1, ep=1, edp=1)
    assert not communication(replace(STEP, layout=layout))
    assert not communication(replace(STEP, layout=replace(layout, engine="transformers")))


def test_etp_gathers_the_tokens_of_its_ranks():
    found = sent(change(etp=2, ep=4))
    copies = LAYERS * MICRO * TOKENS * HIDDEN * BYTES * 2
    assert found["all-gather", "tokens within ETP"] == 2 * copies
    assert found["reduce-scatter", "outputs within ETP"] == 2 * copies


def test_cp_sends_keys_and_values_instead_of_activations():
    found = sent(change(tp=1, cp=2))
    pairs = LAYERS * MICRO * TOKENS * 2 * 1024 * BYTES
    assert found["all-gather", "keys and values"] == 2 * pairs
    assert found["reduce-scatter", "gradients of keys and values"] == pairs
    assert ("all-gather", "activations within TP") not in found


def test_shared_experts_and_dense_layers_add_blocks_that_tp_splits():
    before = sent(STEP)["all-gather", "activations within TP"]
    shared = replace(STEP, sizes=replace(STEP.sizes, shared_width=1024))
    assert sent(shared)["all-gather", "activations within TP"] == 2 * before
    dense = replace(STEP, sizes=replace(STEP.sizes, moe_layers=0))
    assert sent(dense)["all-gather", "activations within TP"] == 2 * before
    assert ("all-to-all", "tokens to experts and back") not in sent(dense)


def test_recomputation_repeats_the_forward_pass():
    again = sent(replace(STEP, workload=workload(recompute=True)))
    before = sent(STEP)
    for key, factor in {
        ("all-to-all", "tokens to experts and back"): 6 / 4,
        ("all-gather", "activations within TP"): 4 / 3,
        ("reduce-scatter", "activations within TP"): 3 / 2,
    }.items():
        assert again[key] == pytest.approx(factor * before[key])


def test_transformers_gathers_weights_for_every_pass():
    layout = Folding(engine="transformers", tp=1, dp=8, ep=4, edp=2)
    step = Step(sizes=STEP.sizes, layout=layout, workload=workload(32))
    found = sent(step)
    experts = 56 * 8 * 3 * HIDDEN * 16384 / 4 / 2
    assert found["all-gather", "expert weights"] == 4 * 2 * 4 * experts
    assert found["reduce-scatter", "expert gradients"] == 4 * 4 * experts
    assert not any("replicas" in purpose for _, purpose in found)


def test_hsdp_sums_the_gradients_of_shards_over_replicas():
    layout = Folding(engine="transformers", tp=1, dp=16, ep=4, edp=4, replicate=2)
    step = Step(sizes=STEP.sizes, layout=layout, workload=workload(16))
    found = sent(step)
    shard = 56 * 8 * 3 * HIDDEN * 16384 / 4 / 2
    for kind in ("all-gather", "reduce-scatter"):
        assert found[kind, "expert gradients, replicas"] == pytest.approx(4 * shard / 2)


def test_transformers_reduces_activations_without_sequence_parallelism():
    """One all-reduce of all tokens forward and one backward, and a gather of the experts' tokens either way."""
    layout = Folding(engine="transformers", tp=2, dp=4, ep=4, edp=2)
    step = Step(sizes=STEP.sizes, layout=layout, workload=workload(4))
    found, once = sent(step), 56 * 2048 * HIDDEN * BYTES
    assert found["reduce-scatter", "activations within TP"] == 2 * once
    assert found["all-gather", "activations within TP"] == 4 * once
