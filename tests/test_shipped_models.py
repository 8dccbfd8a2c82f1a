"""The small dense models that come with the repository: small, complete, and trained as their experiments say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, AutoTokenizer

from upcycle.models.text import DEFAULT_TEXT

ROOT = Path(__file__).parent.parent
MODELS = {"stdlib-250k": "stdlib_250k", "stdlib-2m": "stdlib_2m", "stdlib-hybrid": "stdlib_hybrid"}


def test_their_size() -> None:
    assert {path.name for path in (ROOT / "models").iterdir()} == set(MODELS)
    assert sum(file.stat().st_size for file in (ROOT / "models").rglob("*")) < 15e6


@pytest.mark.parametrize("name", MODELS)
def test_they_are_what_their_experiment_trains(name: str) -> None:
    config = json.loads((ROOT / "models" / name / "upcycle_manifest.json").read_text())["training"]["config"]
    given = OmegaConf.load(ROOT / f"conf/experiment/{MODELS[name]}.yaml")
    if "stdlib_250k" in given.defaults:
        given = OmegaConf.merge(OmegaConf.load(ROOT / "conf/experiment/stdlib_250k.yaml"), given)
    experiment = OmegaConf.to_container(given)
    assert isinstance(experiment, dict)
    assert config["architecture"] == experiment["architecture"]
    assert config["budget"]["steps"] == experiment["budget"]["steps"]
    assert config["schedule"]["peak"] == experiment["schedule"]["peak"]


@pytest.mark.parametrize("name", MODELS)
def test_they_model_python(name: str) -> None:
    """Well under the 4.2 nats per byte of byte frequencies alone, at the length that they were trained at."""
    directory = ROOT / "models" / name
    model = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = tokenizer(DEFAULT_TEXT.read_text()[:1024], return_tensors="pt")["input_ids"].reshape(4, 256)
    with torch.no_grad():
        assert float(model(input_ids=ids, labels=ids).loss) < 1.7
    measured = json.loads((directory / "upcycle_manifest.json").read_text())["training"]["summary"]["val/loss"]
    assert f"| val/loss | {measured:,.6g} |" in (directory / "README.md").read_text()
