"""The search: published foldings come out on top, candidates are possible, and refusals name a remedy."""

from __future__ import annotations

from dataclasses import replace

import pytest
from published import MODELS, RUNS, folding, gpu, workload

from upcycle.errors import ConfigError
from upcycle.parallel.check import checked_layout
from upcycle.parallel.config import ParallelConfig
from upcycle.parallel.search import SHORTEST_PIECE, Request, search

BEST = [run for run in RUNS if run.best]
FREE = folding()
H100 = gpu("h100")


def place(run) -> tuple[int, int]:
    """The published folding's place among the candidates."""
    request = run.request(FREE)
    found = [each.step.layout for each in search(request)]
    return found.index(run.request(run.folding).step().layout) + 1, len(found)


@pytest.mark.parametrize("run", BEST, ids=lambda run: run.model)
def test_the_best_published_folding_is_among_the_top_five(run):
    rank, count = place(run)
    assert rank <= 5
    assert rank <= count / 4


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run.model} {run.gpus} {run.source}")
def test_no_published_run_cuts_sequences_into_pieces_that_are_not_tried(run):
    assert run.length >= (run.folding.cp or 1) * SHORTEST_PIECE


def test_sequences_are_cut_where_they_are_long():
    long = search(request(workload=workload(length=16384)))
    assert {each.step.layout.cp for each in long} == {1, 2, 4}
    assert {each.step.layout.cp for each in search(request(workload=workload(length=2048)))} == {1}
    given = search(request(parallel=folding(cp=2), workload=workload(length=2048)))
    assert {each.step.layout.cp for each in given} == {2}


def request(**changes) -> Request:
    whole = Request(parallel=FREE, sizes=MODELS["Qwen2-57B-A14B"], workload=workload(), gpu=H100, nodes=8)
    return replace(whole, **changes)


def test_candidates_are_possible_fit_and_are_in_order():
    found = search(request())
    assert len({each.step.layout for each in found}) == len(found) > 50
    for each in found:
        layout = each.step.layout
        assert layout.tp * layout.cp * layout.dp * layout.pp == 64
        assert layout.etp * layout.ep * layout.edp * layout.pp == 64
        asked = folding(layout.tp, layout.cp, layout.pp, layout.etp, layout.ep)
        assert checked_layout(asked, each.step.sizes, workload(), H100, 8) == layout
        assert each.memory.total <= 72e9
    times = [each.estimate.seconds for each in found]
    assert times == sorted(times)


def test_what_is_given_is_kept():
    found = search(request(parallel=folding(tp=2, ep=4)))
    assert {(each.step.layout.tp, each.step.layout.ep) for each in found} == {(2, 4)}
    assert {each.step.layout.pp for each in found} == {2, 4}


def test_layouts_of_transformers():
    asked = ParallelConfig(fsdp=None, tp=1, ep=None, replicate=2)
    sizes = MODELS["Llama 3 8B E8T2"]
    found = search(request(parallel=asked, sizes=sizes, nodes=2, gpu=replace(H100, memory=1e12)))
    assert {each.step.layout.ep for each in found} == {1, 2, 4, 8}
    assert {each.step.layout.dp for each in found} == {16}


def test_layouts_of_transformers_are_searched_whole():
    """64 experts on 128 GPUs: one replica of all has more ranks than experts."""
    every = {"sizes": MODELS["Mixtral 8x22B-G8T8"], "nodes": 16, "workload": workload(recompute=True)}
    found = search(request(parallel=ParallelConfig(fsdp=None, tp=None, ep=None, replicate=None), **every))
    layouts = [each.step.layout for each in found]
    assert len(set(layouts)) == len(layouts)
    assert {layout.world for layout in layouts} == {128}
    assert min(layout.replicate for layout in layouts) == 2
    assert {layout.tp for layout in layouts} == {1, 2, 4, 8}
    for each in found:
        layout = each.step.layout
        asked = ParallelConfig(
            fsdp=layout.dp // layout.replicate, tp=layout.tp, ep=layout.ep, replicate=layout.replicate
        )
        assert checked_layout(asked, each.step.sizes, each.step.workload, H100, 16) == layout
    given = search(request(parallel=ParallelConfig(fsdp=None, tp=2, ep=8, replicate=None), **every))
    assert [each.step.layout for each in given] == [each for each in layouts if (each.tp, each.ep) == (2, 8)]


def test_a_world_that_no_layout_fits_names_the_nearest_that_do():
    with pytest.raises(ConfigError) as raised:
        search(request(nodes=11))
    message = str(raised.value)
    assert message.startswith("no layout fits the number of GPUs")
    assert "found:    nodes 11 * 8 = 88 GPUs" in message
    assert "set nodes to 8 or 14" in message


def test_a_model_that_is_too_large_names_the_nodes_it_fits_on():
    with pytest.raises(ConfigError) as raised:
        search(request(nodes=1))
    message = str(raised.value)
    assert message.startswith("no layout fits in memory")
    assert "at most 72.0 GB of h100" in message
    nodes = int(message.split("set nodes to ")[1])
    assert search(request(nodes=nodes))


def test_no_remedy_where_there_is_none():
    with pytest.raises(ConfigError) as raised:
        search(request(parallel=folding(1, 1, None, 1, None), gpu=replace(H100, memory=1e9)))
    assert "remedy" not in str(raised.value)


def test_what_cannot_be_is_said_as_such():
    with pytest.raises(ConfigError, match="workload.micro is out of range"):
        search(request(workload=workload(micro=0)))
