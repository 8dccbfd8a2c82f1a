"""The table of engines: what plan and card say, and how it decides between types."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import product

import pytest
from conversions import described, planned

from upcycle.arch.engines import ENGINES, RULES, Features, features, serving
from upcycle.arch.targets import TARGETS

PLAIN = Features(
    router_order="softmax_topk",
    shared=False,
    dense_layers=False,
    windows="none",
    attention_bias="none",
    heads_fill=True,
    rope="default",
    tied=False,
    portable=True,
)
TOPK = {"router_order": "topk_softmax"}
# type, changes of PLAIN, and what vLLM and llama.cpp do.
MEASURED = [
    ("qwen2_moe", {}, "exact", "exact"),
    ("qwen2_moe", {"shared": True}, "exact", "exact"),
    ("qwen2_moe", {"tied": True}, "exact", "exact"),
    ("qwen2_moe", {"portable": False}, "refuses", "refuses"),
    ("qwen2_moe", {"portable": False, "shared": True}, "differs", "differs"),
    ("qwen2_moe", {"portable": False, "shared": True, "tied": True}, "differs", "refuses"),
    ("qwen2_moe", {"portable": False, "shared": True, "attention_bias": "qkv"}, "exact", "differs"),
    ("qwen2_moe", TOPK, "exact", "differs"),
    ("qwen2_moe", {"dense_layers": True}, "exact", "refuses"),
    ("qwen2_moe", {"heads_fill": False}, "differs", "refuses"),
    ("qwen2_moe", {"windows": "uniform"}, "exact", "differs"),
    ("qwen2_moe", {"windows": "mixed", "attention_bias": "qkv"}, "differs", "differs"),
    ("mixtral", TOPK, "exact", "exact"),
    ("mixtral", TOPK | {"heads_fill": False}, "exact", "exact"),
    ("mixtral", TOPK | {"windows": "uniform"}, "exact", "differs"),
    ("qwen3_moe", {}, "exact", "differs"),
    ("qwen3_moe", TOPK, "exact", "exact"),
    ("qwen3_moe", TOPK | {"dense_layers": True}, "exact", "refuses"),
    ("qwen2_moe", {"rope": "llama3"}, "exact", "differs"),
    ("mixtral", TOPK | {"rope": "llama3"}, "exact", "exact"),
    ("mixtral", TOPK | {"rope": "dynamic"}, "unmeasured", "unmeasured"),
    ("qwen3_moe", TOPK | {"rope": "llama3"}, "exact", "differs"),
    ("granitemoeshared", TOPK | {"rope": "llama3"}, "exact", "refuses"),
    ("qwen3_moe", TOPK | {"attention_bias": "qkvo"}, "differs", "refuses"),
    ("granitemoeshared", TOPK | {"heads_fill": False}, "differs", "refuses"),
    ("granitemoeshared", TOPK | {"shared": True}, "exact", "exact"),
    ("granitemoeshared", TOPK | {"attention_bias": "qkvo"}, "differs", "exact"),
    ("olmoe", {}, "exact", "exact"),
    ("olmoe", TOPK, "differs", "differs"),
    ("flex_olmo", {}, "exact", "refuses"),
    ("nemotron_h", {"router_order": "sigmoid_topk"}, "unmeasured", "unmeasured"),
    ("upcycled_moe", {}, "refuses", "refuses"),
]


@pytest.mark.parametrize(("model_type", "changes", "vllm", "llama"), MEASURED)
def test_what_an_engine_does(model_type: str, changes: dict[str, object], vllm: str, llama: str) -> None:
    found = {each.engine: each.verdict for each in serving(model_type, replace(PLAIN, **changes))}
    assert (found["vLLM"], found["llama.cpp"]) == (vllm, llama)


def test_every_engine_has_one_line_and_every_rule_its_case() -> None:
    """No rule names a type or a feature that there is not, or is never met."""
    known = {field.name for field in fields(Features)}
    values = {
        "router_order": ("softmax_topk", "topk_softmax"),
        "attention_bias": ("none", "qkv", "qkvo"),
        "windows": ("none", "uniform", "mixed"),
        "rope": ("default", "llama3", "dynamic"),
    }
    every = [
        Features(**dict(zip(known, each, strict=True)))
        for each in product(*(values.get(name, (False, True)) for name in known))
    ]
    for rule in RULES:
        assert rule.when.keys() <= known
        assert set(rule.types) <= set(TARGETS)
        lines = [serving(model_type, found) for model_type in rule.types for found in every]
        assert any(each.why == rule.why and each.engine == rule.engine for line in lines for each in line), rule
        assert all(tuple(each.engine for each in line) == ENGINES for line in lines)


def test_the_line_for_a_person() -> None:
    told = [str(each) for each in serving("qwen3_moe", PLAIN)]
    assert told[0] == "vLLM: served exactly"
    assert told[1] == ("llama.cpp: computes something else: it renormalises top-k weights whatever norm_topk_prob says")


@pytest.mark.parametrize(
    ("name", "asked", "expected"),
    [
        ("llama_tied", {"layers": "every_2"}, {"dense_layers": True, "tied": True, "rope": "llama3"}),
        ("mistral", TOPK, {"windows": "uniform", "heads_fill": False, "router_order": "topk_softmax"}),
        ("qwen2", {"shared_experts": 1}, {"shared": True, "attention_bias": "qkv", "tied": True}),
        ("llama_attention_bias", {"portable": False}, {"attention_bias": "qkvo", "portable": False}),
    ],
)
def test_features_of_a_request(name: str, asked: dict[str, object], expected: dict[str, object]) -> None:
    model = described(name)
    moe = planned(model, **asked).moe
    assert features(model, moe, portable=bool(asked.get("portable", True))) == replace(PLAIN, **expected)


def test_the_type_that_more_engines_serve_is_chosen() -> None:
    """And the plan says what spoke against the ones that come before it."""
    plan = planned(described("llama"), shared_experts=1, **TOPK)
    assert plan.target == "granitemoeshared"
    assert all(each.verdict == "exact" for each in plan.serving)
    plan = planned(described("qwen3_one_head"))
    assert plan.target == "olmoe"
    passed_over = "qwen3_moe, which expresses it too: llama.cpp: computes something else: it renormalises"
    assert any(line.startswith(passed_over) for line in plan.why)


def test_what_is_not_measured_is_not_called_exact() -> None:
    plan = planned(described("nemotron_h"), router_order="auto")
    assert plan.target == "nemotron_h"
    assert {each.verdict for each in plan.serving} == {"unmeasured"}
