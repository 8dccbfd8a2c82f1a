"""The small dense models that come with the repository: small, complete, and trained as their experiments say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
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


def test_time_steps_below_their_least() -> None:
    """What docs/nemotron.md says of those that transformers alone raises to time_step_min."""
    model = AutoModelForCausalLM.from_pretrained(ROOT / "models/stdlib-hybrid")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "models/stdlib-hybrid")
    ids = tokenizer(DEFAULT_TEXT.read_text()[:8192], return_tensors="pt")["input_ids"].reshape(16, 512)
    mamba = model.model.layers[0].mixer
    steps: list[torch.Tensor] = []

    def keep(_module: object, _inputs: object, projected_BLR: torch.Tensor) -> None:
        steps.append(F.softplus(projected_BLR[..., -mamba.num_heads :] + mamba.dt_bias))

    mamba.in_proj.register_forward_hook(keep)
    with torch.no_grad():
        raised = model(input_ids=ids, labels=ids)
        mamba.time_step_limit = (0.0, float("inf"))
        free = model(input_ids=ids, labels=ids)
    least = model.config.time_step_min
    assert 0.05 < float((steps[0] < least).float().mean()) < 0.15
    assert float(raised.loss) == pytest.approx(float(free.loss), abs=1e-4)
    assert 0.05 < float((raised.logits.log_softmax(-1) - free.logits.log_softmax(-1)).abs().max()) < 0.2
