"""Layouts that cannot work are refused with what was found and the nearest that does."""

from __future__ import annotations

from dataclasses import replace

import pytest
from published import MODELS, folding, gpu, workload

from upcycle.errors import ConfigError
from upcycle.parallel.check import checked_layout
from upcycle.parallel.config import ParallelConfig
from upcycle.parallel.sizes import Mamba

COARSE, FINE = MODELS["Mixtral 8x22B"], MODELS["Mixtral 8x22B-G8T8"]
H100 = gpu("h100")


def fsdp(fsdp: int | None = None, tp: int = 1, ep: int | None = None, replicate: int = 1) -> ParallelConfig:
    return ParallelConfig(fsdp=fsdp, tp=tp, ep=ep, replicate=replicate)


def refused(parallel, nodes, *, sizes=FINE, step=None, machine=H100) -> str:
    with pytest.raises(ConfigError) as raised:
        checked_layout(parallel, sizes, step or workload(), machine, nodes)
    return str(raised.value)


def test_folding():
    layout = checked_layout(folding(4, 1, 8, 1, 8), FINE, workload(), H100, 16)
    assert layout.name == "TP4 CP1 DP4 PP8, ETP1 EP8 EDP2"
    assert layout.world == 128 == layout.etp * layout.ep * layout.edp * layout.pp


def test_hsdp():
    layout = checked_layout(fsdp(tp=2, ep=8, replicate=4), FINE, workload(), H100, 16)
    assert layout.name == "4 x FSDP16 TP2, EP8 EDP16"
    assert (layout.shards.size, layout.shards.stride) == (16, 2)
    assert (layout.expert_shards.size, layout.expert_shards.stride) == (4, 8)
    assert (layout.replicas.size, layout.replicas.stride) == (4, 32)


@pytest.mark.parametrize(
    ("parallel", "nodes", "what", "found", "remedy"),
    [
        (folding(2, 1, 8, 1, 8), 12, "number of GPUs", "nodes 12 * 8 = 96 GPUs", "set nodes to 8 or 16"),
        (folding(8, 1, 7, 1, 1), 5, "number of GPUs", "nodes 5 * 8 = 40 GPUs", "set nodes to 7"),
        (folding(tp=16), 2, "heads of keys and values", "8 % tp 16 = 8", "set parallel.tp to 8"),
        (folding(pp=16), 16, "the layers", "56 % pp 16 = 8", "set parallel.pp to 14 or 28"),
        (folding(ep=6), 3, "the experts", "64 % ep 6 = 4", "set parallel.ep to 4 or 8"),
        (folding(etp=3), 3, "width of an expert", "2048 % etp 3 = 2", "set parallel.etp to 2 or 4"),
        (folding(cp=0), 1, "parallel.cp is out of range", "0", None),
        (fsdp(tp=2, replicate=3), 2, "no layout of these options", "16 ranks for replicate=3", "12 or 18 ranks"),
        (fsdp(fsdp=4), 1, "no layout of these options", "8 ranks for replicate=1, fsdp=4", "4 ranks"),
        (fsdp(tp=2, ep=1), 1, "does not split experts", "tp=2, ep=1", "set parallel.ep=2"),
        (fsdp(tp=4, ep=2), 1, "ep does not fit the ranks", "ep=2 of fsdp * tp = 8", "set parallel.ep=4"),
        (fsdp(ep=8), 16, "more ranks than experts", "= 128, 64 experts", "parallel.replicate=2 parallel.fsdp=64"),
        (fsdp(tp=2, ep=8), 32, "more ranks than experts", "tp = 256", "parallel.replicate=4 parallel.fsdp=32"),
        (fsdp(tp=16, ep=16), 2, "heads of keys and values", "tp=16, 8 heads", "set parallel.fsdp=2 parallel.tp=8"),
    ],
)
def test_impossible_layouts_name_the_nearest(parallel, nodes, what, found, remedy):
    message = refused(parallel, nodes)
    assert what in message.splitlines()[0]
    assert f"found:    {found}" in message or found in message
    assert remedy is None or remedy in message


@pytest.mark.parametrize(
    ("groups", "parallel", "what", "remedy"),
    [
        (3, folding(tp=2), "tp does not divide the groups of Mamba-2", "set parallel.tp to 1 or 3"),
        (8, folding(tp=2, cp=64), "cp does not divide the heads of Mamba-2 that tp leaves a rank", "parallel.cp to 48"),
        (6, folding(tp=2, cp=2), "cp neither divides the groups of Mamba-2", "set parallel.cp to 1 or 3"),
    ],
)
def test_tp_and_cp_split_groups_of_mamba(groups, parallel, what, remedy):
    mamba = Mamba(channels=96 * 64, heads=96, states=128, groups=groups, convolved=96 * 64 + 256 * groups, kernel=4)
    message = refused(parallel, 16, sizes=replace(FINE, mamba=mamba))
    assert what in message.splitlines()[0]
    assert remedy in message


def test_heads_of_one_group_are_split_by_cp():
    mamba = Mamba(channels=96 * 64, heads=96, states=128, groups=2, convolved=96 * 64 + 512, kernel=4)
    step = workload()
    assert checked_layout(folding(tp=2, cp=4), replace(FINE, mamba=mamba), step, H100, 1).cp == 4


def test_ep_has_to_divide_the_experts():
    odd = replace(FINE, experts=60)
    assert "set parallel.ep=4" in refused(fsdp(ep=8), 1, sizes=odd)


def test_shared_experts_and_dense_layers_are_split_by_tp():
    assert "width of the shared experts" in refused(folding(tp=8), 1, sizes=replace(FINE, shared_width=12))
    odd = replace(FINE, ffn_width=1002, moe_layers=1)
    assert "the width of the FFN" in refused(folding(tp=4), 1, sizes=odd)


@pytest.mark.parametrize(
    ("step", "found", "remedy"),
    [
        (workload(100), "dp 128 * micro 1 = 128", "set workload.sequences to 128"),
        (workload(300, 2), "dp 128 * micro 2 = 256", "set workload.sequences to 256 or 512"),
    ],
)
def test_batches_are_shared_out_evenly(step, found, remedy):
    message = refused(folding(), 16, step=step)
    assert found in message
    assert remedy in message


def test_sequences_are_cut_evenly():
    message = refused(folding(tp=4, cp=2), 1, step=workload(length=4100))
    assert "a multiple of tp 4 * cp 2 * 2 = 16" in message
    assert "set workload.sequence_length to 4096 or 4112" in message
    checked_layout(fsdp(tp=4, ep=8), FINE, workload(length=4099), H100, 1)


@pytest.mark.parametrize("step", [workload(0), workload(micro=0), workload(length=-1)])
def test_workloads_are_positive(step):
    assert "is out of range" in refused(folding(), 1, step=step)
