"""The shipped sweeps: every arm is accepted at every scale, and the committed results are those of the arms."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import models
import pytest
from omegaconf import OmegaConf

if TYPE_CHECKING:
    from collections.abc import Callable

    from cli import Outcome

pytest_plugins = ("tiny",)
ROOT = Path(__file__).parent.parent
SWEEPS = sorted(file.stem for file in (ROOT / "sweeps").glob("*.yaml"))
ARMS: Any = OmegaConf.to_container(OmegaConf.load(ROOT / "sweeps/step0.yaml").sweep.arms)
ROWS = {row["case"]: row for row in json.loads((ROOT / "analysis/results/step0.json").read_text())["rows"]}
SMOLLM2 = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
MINITRON = {
    "model_type": "nemotron",
    "hidden_size": 3072,
    "intermediate_size": 9216,
    "num_hidden_layers": 32,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "vocab_size": 256000,
}


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models of the scales that need a network: their configs with two layers, and a small tokenizer."""
    directories = {}
    for scale, config in {"smollm2": SMOLLM2, "paper": MINITRON}.items():
        directory = tmp_path_factory.mktemp(scale)
        (directory / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
        models.tokenizer().save_pretrained(directory)
        directories[scale] = directory
    return directories


def own_source(name: str) -> Path | None:
    """The small model that a sweep is about, at the scales that a laptop runs; None where it is the scale's."""
    own = OmegaConf.load(ROOT / f"sweeps/{name}.yaml").get("source")
    return ROOT / own if own else None


@pytest.mark.parametrize("name", SWEEPS)
def test_a_sweep_is_valid_at_laptop_scale(
    name: str, upcycle: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("upcycle.sweep.command.free_bytes", lambda _output: 10**18)  # whatever this machine has left
    source = own_source(name) or ROOT / "models/stdlib-250k"
    planned = upcycle("plan-sweep", f"+sweeps={name}", "scale=laptop", f"source={source}")
    assert planned.status == 0, planned.err
    assert re.search(r"^\d+ runs \(\d+ arms, seeds \d[\d, ]+\)", planned.out, flags=re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("name", SWEEPS)
def test_a_sweep_is_valid_at_every_scale(
    name: str, published: dict[str, Path], upcycle: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("upcycle.sweep.command.free_bytes", lambda _output: 10**18)  # as the scale's machine has
    own = own_source(name)
    scales = {"smoke": own} if own else {"smoke": ROOT / "models/stdlib-250k", **published}
    for scale, source in scales.items():
        planned = upcycle("plan-sweep", f"+sweeps={name}", f"scale={scale}", f"source={source}")
        assert planned.status == 0, planned.err


@pytest.mark.parametrize("name", SWEEPS)
def test_a_header_says_what_is_asked_and_what_is_known(name: str) -> None:
    sweep = OmegaConf.load(ROOT / f"sweeps/{name}.yaml").sweep
    assert sweep.question.endswith("?")
    assert "arXiv" in sweep.published or sweep.published.startswith("No comparison is known")


def test_the_results_are_those_of_the_arms() -> None:
    assert {case: row["options"] for case, row in ROWS.items()} == ARMS


@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_is_accepted(arm: str, tmp_path: Path, upcycle: Callable[..., Outcome]) -> None:
    """Planned from the config alone; the type, and whether it is lossless, are as measured."""
    (tmp_path / "config.json").write_text(json.dumps(SMOLLM2))
    planned = json.loads(upcycle("plan", f"source={tmp_path}", "format=json", *ARMS[arm]).out)
    assert planned["target"] == ROWS[arm]["model_type"]
    assert planned["lossless"] is (abs(ROWS[arm]["loss_gap"]) <= 1e-3)
