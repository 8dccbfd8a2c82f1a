"""Properties of every plan: nothing is forgotten, nothing twice, and every share adds up."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import models
import pytest
from conversions import ROUTER_ORDERS, described, planned
from hypothesis import given, settings
from hypothesis import strategies as st

from upcycle.plan.coverage import check_coverage
from upcycle.plan.parts import Beside, Constant, DropNeurons, Normal, Take, Whole, numel, taken

RESIZABLE = sorted(set(models.MODELS) - {"qwen3_one_head", "phi3_longrope"})  # these fix the size of a head
WITH_HEAD_DIM = ("llama", "mistral", "qwen3", "gemma", "gemma2", "gemma3_text", "nemotron", "nemotron_h")
INITS = ("virtual_group", "copy", "drop", "noise", "random")


@st.composite
def requests(draw, inits=INITS):
    """A model of any family and any shape, and a request that it can fulfil."""
    name = draw(st.sampled_from(RESIZABLE))
    family = models.MODELS[name]["model_type"]
    granularity, width = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    sizes = {"num_hidden_layers": draw(st.integers(1, 4)), "hidden_size": 8 * draw(st.integers(1, 3))}
    if family == "nemotron_h":
        kinds = draw(st.permutations(["*", "-", *draw(st.lists(st.sampled_from("M*-"), max_size=3))]))
        sizes |= {"hybrid_override_pattern": "".join(kinds), "num_hidden_layers": len(kinds)}
    neurons = draw(st.one_of(st.none(), st.just("all"), st.integers(1, 7)))
    alone = neurons if isinstance(neurons, int) else 0
    sizes["n_inner" if family == "gpt2" else "intermediate_size"] = granularity * width + alone
    if family != "gpt2":
        sizes["num_key_value_heads"] = draw(st.sampled_from([1, 2]))
        sizes["num_attention_heads"] = sizes["num_key_value_heads"] * draw(st.sampled_from([1, 2]))
    if family in WITH_HEAD_DIM:
        sizes["head_dim"] = 2 * draw(st.integers(1, 4))
    model = described(name, **sizes)
    groups = draw(st.integers(1, 3))
    orders = ROUTER_ORDERS if granularity == 1 else (*ROUTER_ORDERS, "sigmoid_topk", "auto")
    request = {
        "granularity": granularity,
        "expansion": draw(st.integers(groups, 4)),
        "top_k": groups * granularity,
        "shared_experts": 0 if neurons else draw(st.integers(0, 2 * granularity + 1)),
        "shared_neurons": neurons,
        "layers": draw(st.lists(st.integers(0, len(model.ffn_layers) - 1), min_size=1, unique=True)),
        "router_order": draw(st.sampled_from(orders)),
        "init": draw(st.sampled_from(inits)),
        "target": draw(st.sampled_from(["auto", "upcycled_moe"])),
    }
    return model, request


@given(requests())
def test_every_tensor_is_complete_and_named_once(case):
    model, request = case
    plan = planned(model, **request)
    names = [tensor.name for tensor in plan.tensors]
    assert len(names) == len(set(names))
    for tensor in plan.tensors:
        elements = 1
        for size in tensor.shape:
            elements *= size
        assert sum(numel(part, model.tensors()) for part in tensor.parts) == elements


@given(requests())
def test_every_source_element_is_used_or_its_tensor_dropped(case):
    """Counted here element by element, by reading every part from a source that counts."""
    model, request = case
    plan = planned(model, **request)
    used = defaultdict(set)
    for part in (part for tensor in plan.tensors for part in tensor.parts):
        if isinstance(part, Whole):
            used[part.source] = None
        for take in taken(part):
            for row in range(*take.rows):
                used[take.source] |= {(row, col) for col in range(*(take.cols or (0, 1)))}
    assert set(used) | set(plan.dropped) == set(model.tensors())
    assert set(used).isdisjoint(plan.dropped)
    for name, elements in used.items():
        shape = model.tensors()[name]
        if elements is not None:
            transposed = model.family.ffn.transposed and len(shape) == 2
            rows, cols = (*(reversed(shape) if transposed else shape), 1)[:2]
            assert elements == {(row, col) for row in range(rows) for col in range(cols)}


@given(requests(inits=("virtual_group", "copy")))
def test_shares_of_routed_and_shared_experts_add_up_to_one_ffn(case):
    """For every neuron: the routed copies' share, and the shared ones' behind their sigmoid, are one FFN together."""
    model, request = case
    plan = planned(model, **request)
    for layer in plan.moe.layers:
        routed, shared = shares(plan, model, layer)
        for neuron in range(model.ffn_width):
            share = [*routed[neuron], *shared[neuron]]
            assert len(routed[neuron]) <= 1
            assert sum(share) == pytest.approx(1.0)


def shares(plan, model, layer):
    """By neuron: what each different copy of its column of the down matrix contributes, in units of the dense FFN's."""
    routed, shared = defaultdict(set), defaultdict(list)
    gate = 0.5 if plan.target == "qwen2_moe" else 1.0
    source = model.ffn_tensor(layer, "down")
    for tensor in plan.tensors:
        for part in tensor.parts:
            for take in taken(part):
                for neuron in range(*take.cols) if take.source == source else ():
                    if tensor.kind == "expert":
                        routed[neuron].add(take.factor / plan.scaling[layer].matrix["down"])
                    elif tensor.kind == "shared":
                        shared[neuron].append(take.factor * gate)
    return routed, shared


@given(requests(inits=("virtual_group",)))
def test_router_rows_are_tied_in_groups(case):
    model, request = case
    plan = planned(model, **request)
    routers = [tensor for tensor in plan.tensors if tensor.kind == "router"]
    assert len(routers) == len(plan.moe.layers)
    assert len({router.parts[0].key for router in routers}) == len(routers)
    for router in routers:
        assert router.shape == (plan.moe.experts, model.hidden_size)
        assert router.parts[0].repeat == plan.moe.granularity


MUTANTS = {
    "a tensor dropped": lambda tensors, index, part: tensors[:index] + tensors[index + 1 :],
    "a tensor twice": lambda tensors, index, part: [*tensors, tensors[index]],
    "a part dropped": lambda tensors, index, part: with_part(tensors, index, part, lambda _part: []),
    "a part twice": lambda tensors, index, part: with_part(tensors, index, part, lambda part: [part, part]),
    "rows shifted": lambda tensors, index, part: with_part(tensors, index, part, lambda part: [shifted(part)]),
}


def with_part(tensors, index, part, change):
    parts = tensors[index].parts
    changed = replace(tensors[index], parts=(*parts[:part], *change(parts[part]), *parts[part + 1 :]))
    return [*tensors[:index], changed, *tensors[index + 1 :]]


def shifted(part):
    match part:
        case Take():
            return replace(part, rows=tuple(row + 1 for row in part.rows))
        case Beside():
            return replace(part, parts=tuple(shifted(each) for each in part.parts))
        case Whole():
            return Take(source=part.source, rows=(1, 2))
        case Normal() | Constant() | DropNeurons():
            return Constant(numel=1)


@pytest.mark.parametrize("mutant", MUTANTS)
@given(case=requests(inits=("virtual_group",)), choice=st.integers(0, 10**6))
@settings(max_examples=50)
def test_mutated_plan_is_rejected(mutant, case, choice):
    model, request = case
    plan = planned(model, **request | {"expansion": 1, "top_k": request["granularity"], "shared_experts": 0})
    # Which tensors a type must have, transformers knows: a router that is left out is not for this check.
    # Nor is a head that repeats the embedding for engines.
    kept = [t for t in plan.tensors if t.kind != "copy"]
    from_source = [t for t in kept if any(isinstance(part, Whole) or taken(part) for part in t.parts)]
    if plan.moe.shared == "whole":  # what is the shared expert's and the routed ones' is not lost with either
        from_source = [t for t in from_source if t.kind == "backbone" or (t.kind == "shared" and "down" in t.name)]
    candidates = from_source if mutant == "a tensor dropped" else [t for t in plan.tensors if t.parts]
    kinds = sorted({tensor.kind for tensor in candidates})  # most are of the backbone
    candidates = [tensor for tensor in candidates if tensor.kind == kinds[choice % len(kinds)]]
    tensor = candidates[choice // len(kinds) % len(candidates)]
    index, part = plan.tensors.index(tensor), choice % len(tensor.parts)
    mutated = replace(plan, tensors=tuple(MUTANTS[mutant](list(plan.tensors), index, part)))
    check_coverage(plan.tensors, model.tensors(), dropped=plan.dropped)
    with pytest.raises(AssertionError, match="not taken over exactly|produced|planned twice"):
        check_coverage(mutated.tensors, model.tensors(), dropped=mutated.dropped)


def test_an_expert_that_is_shifted_beside_the_whole_ffn_is_rejected():
    """The shared expert has every neuron, which does not excuse the routed ones."""
    model = described("nemotron_h")
    plan = planned(model, router_order="auto", shared_neurons="all")
    index = next(index for index, tensor in enumerate(plan.tensors) if tensor.kind == "expert")
    mutated = MUTANTS["rows shifted"](list(plan.tensors), index, 0)
    with pytest.raises(AssertionError, match="not taken over exactly"):
        check_coverage(mutated, model.tensors(), dropped={})
