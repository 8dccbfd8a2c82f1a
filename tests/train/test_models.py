"""The four arms: what training starts from."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import conversions
import pytest
import torch
import training
from models import token_ids
from transformers import AutoModelForCausalLM

from upcycle.errors import ConfigError, SourceError
from upcycle.train.models import start_model

if TYPE_CHECKING:
    from pathlib import Path

pytest_plugins = ("text_model",)

# Each native type that the tiny Llama goes to, and the generic one.
TINY = "model_type: llama, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 2, num_attention_heads: 2"
TARGETS = [("mixtral", "topk_softmax"), ("qwen2_moe", "softmax_topk"), ("upcycled_moe", "softmax_topk")]


@pytest.mark.parametrize(("target", "order"), TARGETS)
def test_upcycling_in_memory_is_convert_and_load(
    text: Path, text_model: Path, tmp_path: Path, target: str, order: str
) -> None:
    made = [
        "model=upcycle",
        f"source='{text_model}'",
        *training.SMALL_MOE,
        f"target={target}",
        f"moe.router_order={order}",
        "init.router_std=0.01",
        "seed=3",
    ]
    start = start_model(training.options(text, tmp_path / "run", *made))
    names = {"expansion": 2, "granularity": 2, "top_k": 2, "router_order": order, "router_std": 0.01}
    given = {"target": target, "seed": 3, "dtype": "float32", "portable": False, **names}
    request = conversions.options(text_model, tmp_path / "moe", **given)
    written = conversions.load(conversions.run(request).directory)
    assert training.differing_tensors(start.model.state_dict(), written.state_dict()) == []
    assert start.moe is not None
    assert (start.moe.model_type, start.moe.name) == (target, "E2G2T2")
    assert start.manifest["source"]["sha256"]
    assert not (tmp_path / "run").exists()


def test_another_seed_is_noticed(text: Path, text_model: Path, tmp_path: Path) -> None:
    """The mutant of the test above: the router's rows depend on the seed."""
    made = ["model=upcycle", f"source='{text_model}'", *training.SMALL_MOE]
    one, other = (start_model(training.options(text, tmp_path / "run", *made, f"seed={seed}")) for seed in (0, 1))
    differing = training.differing_tensors(one.model.state_dict(), other.model.state_dict())
    assert [name for name in differing if "gate.weight" in name] == differing != []


def test_dense_is_the_source(text: Path, text_model: Path, tmp_path: Path) -> None:
    start = start_model(training.options(text, tmp_path / "run", "model=dense", f"source='{text_model}'"))
    saved = AutoModelForCausalLM.from_pretrained(text_model, dtype=torch.float32)
    assert training.differing_tensors(start.model.state_dict(), saved.state_dict()) == []
    assert start.moe is None
    assert start.model.training


def test_scratch_has_the_same_shape_and_other_values(text: Path, text_model: Path, tmp_path: Path) -> None:
    arms = {
        arm: start_model(
            training.options(text, tmp_path / "run", f"model={arm}", f"source='{text_model}'", *training.SMALL_MOE)
        )
        for arm in ("upcycle", "scratch")
    }
    one, other = (arm.model.state_dict() for arm in arms.values())
    assert {name: value.shape for name, value in one.items()} == {name: value.shape for name, value in other.items()}
    matrices = {f"/{name}" for name, value in one.items() if value.dim() > 1 and value.numel()}
    assert matrices - {"/model.layers.0.mlp.shared_expert_gate.weight"} <= set(
        training.differing_tensors(one, other)
    ) | {name for name in matrices if "shared_expert_gate" in name}
    assert asdict(arms["upcycle"].moe) == asdict(arms["scratch"].moe)  # type: ignore[call-overload]


def test_scratch_from_an_architecture(text: Path, tmp_path: Path) -> None:
    architecture = f"architecture={{{TINY}}}"
    made = ["model=scratch", architecture, "tokenizer=bytes"]
    starts = [start_model(training.options(text, tmp_path / "run", *made, f"seed={seed}")) for seed in (0, 0, 1)]
    same, again, other = (start.model.state_dict() for start in starts)
    assert starts[0].model.config.vocab_size == len(starts[0].tokenizer) == 257
    assert training.differing_tensors(same, again) == []
    assert training.differing_tensors(same, other) != []


@pytest.mark.parametrize("target", ["qwen2_moe", "upcycled_moe"])
def test_a_checkpoint_that_convert_wrote(text: Path, text_model: Path, tmp_path: Path, target: str) -> None:
    directory = conversions.run(conversions.options(text_model, tmp_path / "moe", target=target)).directory
    start = start_model(training.options(text, tmp_path / "run", "model=checkpoint", f"source='{directory}'"))
    saved = conversions.load(directory)
    with torch.no_grad():
        ids = token_ids()
        start.model.eval()
        torch.testing.assert_close(start.model(ids).logits, saved(ids).logits, rtol=1e-4, atol=1e-5)
    assert start.moe is not None
    assert start.moe.granularity == 2
    assert start.source is not None  # the dense model that the manifest names
    assert start.manifest == json.loads((directory / "upcycle_manifest.json").read_text())


def test_a_native_checkpoint_without_a_manifest(text: Path, text_model: Path, tmp_path: Path) -> None:
    directory = conversions.run(conversions.options(text_model, tmp_path / "moe")).directory
    (directory / "upcycle_manifest.json").unlink()
    start = start_model(training.options(text, tmp_path / "run", "model=checkpoint", f"source='{directory}'"))
    assert start.moe is not None
    assert start.moe.granularity == 1
    assert start.source is None


def test_a_dense_checkpoint(text: Path, text_model: Path, tmp_path: Path) -> None:
    start = start_model(training.options(text, tmp_path / "run", "model=checkpoint", f"source='{text_model}'"))
    assert start.moe is None


@pytest.mark.parametrize(
    ("made", "error", "says"),
    [
        (["model=dense"], ConfigError, "needs a source"),
        (["model=scratch"], ConfigError, "architecture="),
        (["model=scratch", "architecture={model_type: llama}"], ConfigError, "tokenizer=bytes"),
        (["model=scratch", "architecture={model_type: lama}", "tokenizer=bytes"], ConfigError, "did you mean llama"),
        (
            ["model=scratch", "architecture={model_type: llama, hidden_size: wide}", "tokenizer=bytes"],
            ConfigError,
            "architecture is not valid",
        ),
        (["model=dense", "source=SOURCE", "architecture={model_type: llama}"], ConfigError, "for model=scratch"),
        (["model=dense", "source=nowhere/x"], SourceError, "nowhere/x"),
        (["model=checkpoint", "source=nowhere/x"], SourceError, "no config.json there"),
        (["model=dense", "source=SOURCE", "tokenizer=nowhere/x"], SourceError, "no tokenizer"),
        (["model=dense", "source=SOURCE", "sequence_length=1000"], ConfigError, "1 to"),
        (["model=dense", "source=SOURCE", "sequence_length=0"], ConfigError, "1 to"),
        (["model=upcycle", "source=SOURCE", "moe.top_k=3"], ConfigError, "top_k"),
        (["model=upcycle", "source=SOURCE", "moe.expansion=2", "moe.top_k=64"], ConfigError, "top_k"),
    ],
)
def test_what_cannot_be_started(
    text: Path, text_model: Path, tmp_path: Path, made: list[str], error: type[Exception], says: str
) -> None:
    given = [each.replace("source=SOURCE", f"source='{text_model}'") for each in made]
    with pytest.raises(error, match=says):
        start_model(training.options(text, tmp_path / "run", *given))


def test_a_tokenizer_larger_than_the_vocabulary(text: Path, text_model: Path, tmp_path: Path) -> None:
    small = f"architecture={{{TINY}, vocab_size: 100}}"
    with pytest.raises(ConfigError, match="more tokens than the model"):
        start_model(training.options(text, tmp_path / "run", "model=scratch", small, f"tokenizer='{text_model}'"))
