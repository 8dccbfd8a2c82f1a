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
TOPK, SIGMOID = {"router_order": "topk_softmax"}, {"router_order": "sigmoid_topk"}
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
    ("nemotron_h", SIGMOID, "exact", "exact"),
    ("nemotron_h", SIGMOID | {"dense_layers": True, "shared": True}, "exact", "refuses"),
    ("nemotron_h", SIGMOID | {"usual_mamba_biases": False}, "exact", "refuses"),
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
    met = set()
    for model_type in TARGETS:
        asked = sorted({name for rule in RULES if model_type in rule.types for name in rule.when})
        for each in product(*(values.get(name, (False, True)) for name in asked)):
            line = serving(model_type, replace(PLAIN, **dict(zip(asked, each, strict=True))))
            assert tuple(found.engine for found in line) == ENGINES
            met |= {(model_type, found.engine, found.why) for found in line}
    for rule in RULES:
        assert rule.when.keys() <= known
        assert set(rule.types) <= set(TARGETS)
        assert any((model_type, rule.engine, rule.why) in met for model_type in rule.types), rule


def test_the_line_for_a_person() -> None:
    told = [str(each) for each in serving("qwen3_moe", PLAIN)]
    assert told[0] == "vLLM: served exactly"
    assert told[1] == ("llama.cpp: computes something else: it renormalises top-k weights whatever norm_topk_prob says")
    told = [str(each) for each in serving("nemotron_h", replace(PLAIN, **SIGMOID))]
    assert told[1] == (
        "llama.cpp: served exactly: but for time steps below time_step_min, which transformers alone raises to it"
    )


@pytest.mark.parametrize(
    ("name", "asked", "expected"),
    [
        ("llama_tied", {"layers": "every_2"}, {"dense_layers": True, "tied": True, "rope": "llama3"}),
        ("mistral", TOPK, {"windows": "uniform", "heads_fill": False, "router_order": "topk_softmax"}),
        ("qwen2", {"shared_experts": 1}, {"shared": True, "attention_bias": "qkv", "tied": True}),
        ("llama_attention_bias", {"portable": False}, {"attention_bias": "qkvo", "portable": False}),
        ("nemotron_h_biases", {}, {"usual_mamba_biases": False}),
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
    rope = {"rope_type": "dynamic", "rope_theta": 1000.0, "factor": 4.0}
    plan = planned(described("llama", rope_parameters=rope))
    assert plan.target == "qwen2_moe"
    assert {each.verdict for each in plan.serving} == {"unmeasured"}
