"""`upcycle plan parallel=…` as its user meets it, on models that are only a config.json."""

from __future__ import annotations

import json

import pytest
from cli import SMALL
from transformers import LlamaConfig, MistralConfig

from upcycle.options.arguments import CONF

pytest_plugins = ["tiny"]

MIXTRAL = ("moe.granularity=1", "moe.top_k=2", "moe.router_order=topk_softmax", "nodes=16")
BEST = ("parallel.tp=2", "parallel.pp=8", "parallel.ep=8")


@pytest.fixture(scope="module")
def dense_mixtral(tmp_path_factory):
    """What Mixtral 8x22B would be upcycled from."""
    config = MistralConfig(
        vocab_size=32768,
        hidden_size=6144,
        intermediate_size=16384,
        num_hidden_layers=56,
        num_attention_heads=48,
        num_key_value_heads=8,
        head_dim=128,
        sliding_window=None,
        dtype="bfloat16",
    )
    directory = tmp_path_factory.mktemp("dense") / "mixtral"
    config.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def llama_8b(tmp_path_factory):
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        dtype="bfloat16",
    )
    directory = tmp_path_factory.mktemp("dense") / "llama-8b"
    config.save_pretrained(directory)
    return directory


def test_without_a_layout_nothing_is_said_of_training(upcycle, tiny_llama):
    plan = json.loads(upcycle("plan", f"source={tiny_llama}", *SMALL, "format=json").out)
    assert "training" not in plan
    table = upcycle("plan", f"source={tiny_llama}", *SMALL)
    assert table.status == 0
    assert "GPU" not in table.out


def test_a_folding(upcycle, monkeypatch, dense_mixtral):
    monkeypatch.setenv("COLUMNS", "100")
    outcome = upcycle("plan", f"source={dense_mixtral}", *MIXTRAL, "parallel=folding", *BEST)
    assert outcome.status == 0
    assert outcome.err == ""
    for text in (
        "mixtral -> E8G1T2",
        "TP2 CP1 DP8 PP8, ETP1 EP8 EDP2",
        "128 h100, 8 in a node",
        "memory per GPU: fits in 72.0 GB",
        "tokens to experts and back",
        "a micro-batch",
        "pipeline bubble",
        "MFU 49.3%",
        "estimates",
    ):
        assert text in outcome.out
    training = outcome.out.split("TP2 CP1")[1]
    assert "…" not in training
    assert max(map(len, outcome.out.splitlines())) <= 100


def test_as_json(upcycle, dense_mixtral):
    options = (f"source={dense_mixtral}", *MIXTRAL, "parallel=folding", *BEST, "format=json")
    plan = json.loads(upcycle("plan", *options).out)
    assert plan["moe"]["name"] == "E8G1T2"
    training = plan["training"]
    assert training["fits"] is True
    assert training["gpu"]["name"] == "h100"
    [layout] = training["layouts"]
    assert layout["layout"]["edp"] == 2
    assert layout["memory"]["total"] == sum(value for key, value in layout["memory"].items() if key != "total")
    assert {each["kind"] for each in layout["communication"]} >= {"all-to-all", "pipeline"}
    assert layout["estimated"]["mfu"] == pytest.approx(0.493, abs=0.001)


def test_search(upcycle, monkeypatch, dense_mixtral):
    monkeypatch.setenv("COLUMNS", "100")
    options = (f"source={dense_mixtral}", *MIXTRAL, "parallel=folding", "search=true", "parallel.cp=1")
    outcome = upcycle("plan", *options)
    assert outcome.status == 0
    assert "layouts that fit, the fastest 10 of" in outcome.out
    rows = [line.split() for line in outcome.out.splitlines() if " ETP" in line and "%" in line]
    assert len(rows) == 10
    assert [row[0] for row in rows] == [str(place) for place in range(1, 11)]
    assert "…" not in outcome.out.split("layouts that fit")[1]
    every = json.loads(upcycle("plan", *options, "format=json").out)["training"]["layouts"]
    assert len(every) > 10
    assert {each["layout"]["cp"] for each in every} == {1}


def test_what_does_not_fit_is_shown_and_fails(upcycle, dense_mixtral):
    outcome = upcycle("plan", f"source={dense_mixtral}", *MIXTRAL, "parallel=folding", "parallel.ep=8")
    assert outcome.status == 1
    assert "DOES NOT FIT in 72.0 GB" in outcome.out
    assert outcome.err == ""


@pytest.mark.parametrize("name", ["ep", "fsdp", "tp_ep", "hsdp_ep"])
def test_layouts_of_transformers(upcycle, monkeypatch, llama_8b, name):
    monkeypatch.setenv("COLUMNS", "100")
    options = ("gpu=b200", "nodes=2", "workload.activation_checkpointing=true")
    outcome = upcycle("plan", f"source={llama_8b}", f"parallel={name}", *options)
    assert outcome.status == 0, outcome
    assert "transformers: FSDP2 x TP x EP" in outcome.out
    assert "gathered" in outcome.out
    assert "…" not in outcome.out.split("engine")[1]


def test_a_file_of_a_gpu(upcycle, tmp_path, llama_8b):
    file = tmp_path / "my gpu.yaml"
    file.write_text((CONF / "gpu" / "b200.yaml").read_text().replace("name: b200", "name: ours"))
    outcome = upcycle("plan", f"source={llama_8b}", "parallel=ep", f"gpu={file}")
    assert outcome.status == 0
    assert "8 ours, 8 in a node" in outcome.out
    missing = tmp_path / "nothing.yml"
    upcycle("plan", f"source={llama_8b}", "parallel=ep", f"gpu={missing}").refused("does not exist", found=str(missing))


@pytest.mark.parametrize(
    ("options", "what", "found", "remedy"),
    [
        (["parallel=folding", "nodes=0"], "nodes is out of range", "0", None),
        (["parallel=folding", "parallel.tp=two"], "parallel.tp is not valid", "two", None),
        (["parallel=ep", "parallel.cp=2"], "parallel.cp does not apply here", "parallel.cp", "--help"),
        (["parallel.tp=2"], "parallel.tp does not apply here", "parallel.tp", "--help"),
        (["parallel=foldings"], "unknown value for parallel", "foldings", "did you mean folding"),
        (["parallel=ep", "gpu=h10"], "unknown value for gpu", "h10", "did you mean h100"),
        (["parallel=ep", "gpu=file"], "a required option is missing", "nothing", "gpu.file"),
        (["parallel=ep", "workload.micros=2"], "unknown option", "workload.micros", "--help"),
        (["parallel=tp_ep", "parallel.ep=1"], "does not split experts", "tp=2, ep=1", "parallel.ep="),
        (["parallel=ep", "nodes=16"], "more ranks than experts", "= 128, 64 experts", "parallel.replicate=2"),
        (["parallel=folding", "parallel.ep=24", "nodes=3"], "not divide the experts", "64 % ep 24", "16 or 32"),
        (["parallel=folding", "parallel.pp=16"], "number of GPUs", "nodes 1 * 8 = 8 GPUs", "set nodes to 2"),
        (["parallel=folding", "search=true", "nodes=11"], "no layout fits the number", "nodes 11", "set nodes to"),
        (["parallel=folding", "search=true"], "no layout fits in memory", "GB per GPU at least", "set nodes to"),
    ],
)
def test_bad_input(upcycle, llama_8b, options, what, found, remedy):
    upcycle("plan", f"source={llama_8b}", *options).refused(what, found=found, remedy=remedy)
