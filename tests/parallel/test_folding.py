"""Which ranks share what, by numbering them: TP, CP, DP, PP of attention and ETP, EP, EDP, PP of the experts."""

from __future__ import annotations

import itertools
import math

from hypothesis import given
from hypothesis import strategies as st
from published import MODELS, workload

from upcycle.parallel.communication import communication
from upcycle.parallel.folding import Folding
from upcycle.parallel.gpu import Group
from upcycle.parallel.rank_layout import divisors
from upcycle.parallel.step import Step

Degrees = tuple[tuple[str, int], ...]


def groups(degrees: Degrees, *along: str) -> set[frozenset[int]]:
    """The sets of ranks that differ in the dimensions `along` alone, where the first dimension counts fastest."""
    sizes, found = dict(degrees), {}
    names = [name for name, _ in degrees]
    for rank, place in enumerate(itertools.product(*(range(sizes[name]) for name in reversed(names)))):
        at = dict(zip(reversed(names), place, strict=True))
        key = tuple(at[name] for name in names if name not in along)
        found.setdefault(key, set()).add(rank)
    return {frozenset(ranks) for ranks in found.values()}


def attention(layout: Folding) -> Degrees:
    return ("tp", layout.tp), ("cp", layout.cp), ("dp", layout.dp), ("pp", layout.pp)


def experts(layout: Folding) -> Degrees:
    return ("etp", layout.etp), ("ep", layout.ep), ("edp", layout.edp), ("pp", layout.pp)


def of_rank_0(group: Group) -> frozenset[int]:
    return frozenset(range(0, group.size * group.stride, group.stride))


@st.composite
def foldings(draw: st.DrawFn) -> Folding:
    stage, stages = draw(st.integers(1, 48)), draw(st.sampled_from((1, 2, 4, 7, 8)))
    tp, etp = (draw(st.sampled_from(divisors(stage))) for _ in range(2))
    cp, ep = (draw(st.sampled_from(divisors(stage // ways))) for ways in (tp, etp))
    edp = stage // (etp * ep)
    return Folding(engine="megatron", tp=tp, cp=cp, dp=stage // (tp * cp), pp=stages, etp=etp, ep=ep, edp=edp)


@given(foldings())
def test_both_numberings_have_the_same_pipeline_groups(layout: Folding) -> None:
    """The one constraint of 2504.14960, section 3."""
    pipelines = groups(attention(layout), "pp")
    assert pipelines == groups(experts(layout), "pp")
    assert len(pipelines) == layout.world // layout.pp
    assert of_rank_0(Group(size=layout.pp, stride=layout.world // layout.pp)) in pipelines


def test_another_numbering_has_others() -> None:
    """With PP before DP, in attention alone, a rank would be in other stages for its experts."""
    first = ("tp", 2), ("pp", 2), ("dp", 2)
    second = ("etp", 1), ("ep", 4), ("edp", 1), ("pp", 2)
    assert groups(first, "pp") != groups(second, "pp")


@given(foldings())
def test_states_are_sharded_within_a_stage_by_ranks_with_the_same_weights(layout: Folding) -> None:
    assert of_rank_0(layout.shards) in groups(attention(layout), "cp", "dp")
    assert of_rank_0(layout.expert_shards) in groups(experts(layout), "edp")


@given(foldings())
def test_what_is_sent_is_sent_to_the_ranks_of_its_dimension(layout: Folding) -> None:
    expected = {
        "tokens to experts and back": groups(experts(layout), "ep"),
        "tokens within ETP": groups(experts(layout), "etp"),
        "activations within TP": groups(attention(layout), "tp"),
        "keys and values": groups(attention(layout), "cp"),
        "activations between stages": groups(attention(layout), "pp"),
        "expert weights": groups(experts(layout), "edp"),
        "other weights": groups(attention(layout), "cp", "dp"),
    }
    step = Step(sizes=MODELS["Mixtral 8x22B"], layout=layout, workload=workload(layout.dp))
    found = {traffic.purpose: of_rank_0(traffic.group) for traffic in communication(step)}
    for purpose in expected.keys() & found.keys():
        assert found[purpose] in expected[purpose], purpose
    ways = math.prod((layout.tp, layout.cp, layout.dp, layout.etp, layout.ep, layout.pp))
    assert ways == 1 or expected.keys() & found.keys()
