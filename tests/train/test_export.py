"""A run as a checkpoint: what plain transformers loads is what was trained."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
import training
from models import token_ids
from transformers import AutoModelForCausalLM, AutoTokenizer

from upcycle.errors import ConfigError, OutputError, RecordError, SourceError
from upcycle.models.moe import describe_moe
from upcycle.options.config import InspectConfig
from upcycle.train.config import ExportConfig
from upcycle.train.export import export
from upcycle.verify.inspection import inspect, inspection_table

if TYPE_CHECKING:
    from pathlib import Path

pytest_plugins = ("text_model",)

ARMS = {
    "dense": ["model=dense"],
    "native": ["model=upcycle", *training.SMALL_MOE, "moe.router_order=topk_softmax"],
    "softmax_topk": ["model=upcycle", *training.SMALL_MOE],
    "generic": [
        "model=upcycle",
        *training.SMALL_MOE,
        "target=upcycled_moe",
        "router.score=sigmoid",
        "router.scaling_factor=2",
        "moe.groups=whole",
        "balance.bias_update=0.05",
    ],
    "scratch": ["model=scratch", *training.SMALL_MOE],
    "positions": ["model=upcycle", *training.SMALL_MOE, "moe.groups=positions", "moe.top_k=4"],
    "free": ["model=upcycle", *training.SMALL_MOE, "moe.groups=free"],
    "released": [
        "model=upcycle",
        *training.SMALL_MOE,
        "target=upcycled_moe",
        "moe.groups=tied",
        "router.release={until: 0.5, then: positions}",
    ],
}
STORED = {"native": "tied", "softmax_topk": "tied", "generic": "whole", "released": "positions"}


def request(run: Path, output: Path, **changes: object) -> ExportConfig:
    asked = ExportConfig(run=str(run), output=str(output), checkpoint="last", dtype="float32", overwrite=False)
    return replace(asked, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("arm", ARMS)
def test_the_export_is_what_was_trained(text: Path, text_model: Path, tmp_path: Path, arm: str) -> None:
    run = training.run(training.options(text, tmp_path / "run", f"source='{text_model}'", *ARMS[arm]))
    directory = export(request(tmp_path / "run", tmp_path / "out"))
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, experts_implementation="eager")
    trained = run.module.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(token_ids()).logits, trained(token_ids()).logits, rtol=1e-4, atol=1e-4)
    assert AutoTokenizer.from_pretrained(directory)("def f(): pass")["input_ids"]
    assert loaded.config.get_text_config().use_cache
    assert len({file.stat().st_mode for file in directory.iterdir()}) == 1
    loaded.generate(token_ids()[:1], max_new_tokens=3, do_sample=False, pad_token_id=0)
    training_record = json.loads((directory / "upcycle_manifest.json").read_text())["training"]
    assert training_record["step"] == 6
    assert f"| val/loss | {run.record.last['val/loss']:,.6g} |" in (directory / "README.md").read_text()
    assert training_record["summary"]["val/loss"] == run.record.last["val/loss"]
    if arm != "dense":
        groups = STORED.get(arm, arm)
        assert arm == "scratch" or describe_moe(directory).groups == groups
        assert arm not in ("generic", "released", "positions") or loaded.config.groups == groups


def test_tied_rows_are_exported_tied(text: Path, text_model: Path, tmp_path: Path) -> None:
    """So the native type's own top-k keeps groups whole; it goes on as it was, and not where rows have parted."""
    made = (f"source='{text_model}'", *ARMS["softmax_topk"])
    training.run(training.options(text, tmp_path / "run", *made))
    directory = export(request(tmp_path / "run", tmp_path / "out"))
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    moe = describe_moe(directory)
    weights = [loaded.get_submodule(moe.router_path(layer)).weight for layer in moe.layers]
    assert all(torch.equal(weight[0::2], weight[1::2]) for weight in weights)
    again = ("model=checkpoint", f"source='{directory}'")
    run = training.run(training.options(text, tmp_path / "again", *again, "budget.steps=2"))
    assert run.module.moe is not None
    assert run.module.moe.groups == "tied"

    training.run(training.options(text, tmp_path / "free", *again, "moe.groups=free", "budget.steps=2"))
    torn = export(request(tmp_path / "free", tmp_path / "torn"))
    assert describe_moe(torn).groups == "free"
    torn_again = training.options(text, tmp_path / "no", "model=checkpoint", f"source='{torn}'", "moe.groups=tied")
    with pytest.raises(ConfigError, match=r"rows of layer 0 that differ(.|\n)*moe.groups=free"):
        training.run(torn_again)


def test_a_way_to_choose_that_the_type_lacks(text: Path, text_model: Path, tmp_path: Path) -> None:
    """Of a native checkpoint that was trained by position: refused at export, with what it takes."""
    made = (f"source='{text_model}'", *ARMS["softmax_topk"])
    training.run(training.options(text, tmp_path / "run", *made))
    native = export(request(tmp_path / "run", tmp_path / "out"))
    again = ("model=checkpoint", f"source='{native}'", "moe.groups=positions", "budget.steps=2")
    training.run(training.options(text, tmp_path / "again", *again))
    with pytest.raises(ConfigError, match=r"moe.groups=positions cannot be stored in qwen2_moe(.|\n)*moe.groups=tied"):
        export(request(tmp_path / "again", tmp_path / "no"))


def test_weights_before_training_are_noticed(text: Path, text_model: Path, tmp_path: Path) -> None:
    """The mutant of the test above: the dense model that training started from."""
    run = training.run(training.options(text, tmp_path / "run", f"source='{text_model}'", "model=dense"))
    before = AutoModelForCausalLM.from_pretrained(text_model, dtype=torch.float32)
    with torch.no_grad():
        gap = (before(token_ids()).logits - run.module.model.eval()(token_ids()).logits).abs().max()
    assert gap > 1e-2


def test_it_loads_without_upcycle(text: Path, text_model: Path, tmp_path: Path) -> None:
    training.run(training.options(text, tmp_path / "run", f"source='{text_model}'", *ARMS["generic"]))
    directory = export(request(tmp_path / "run", tmp_path / "out"))
    code = (
        "import sys; sys.modules['upcycle'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(directory)!r}, trust_remote_code=True)\n"
        "print(type(model).__name__, model.config.router_order)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"},
    )
    assert ended.stdout.split() == ["UpcycledMoeForCausalLM", "sigmoid_topk"], ended.stderr


def test_best_and_bfloat16(text: Path, text_model: Path, tmp_path: Path) -> None:
    """At a learning rate that ruins the model, the best checkpoint is from before the first step."""
    ruinous = ["model=dense", f"source='{text_model}'", "schedule.peak=1", "optim.clip=null"]
    training.run(training.options(text, tmp_path / "run", *ruinous, "schedule=constant"))
    directory = export(request(tmp_path / "run", tmp_path / "out", checkpoint="best", dtype="bfloat16"))
    saved = AutoModelForCausalLM.from_pretrained(text_model, dtype=torch.bfloat16).state_dict()
    loaded = AutoModelForCausalLM.from_pretrained(directory)
    assert loaded.dtype == torch.bfloat16
    assert training.differing_tensors(loaded.state_dict(), saved) == []


@pytest.mark.parametrize("arm", ["softmax_topk", "scratch", "dense"])
def test_inspect_says_how_it_was_trained(text: Path, text_model: Path, tmp_path: Path, arm: str) -> None:
    training.run(training.options(text, tmp_path / "run", f"source='{text_model}'", *ARMS[arm]))
    directory = export(request(tmp_path / "run", tmp_path / "out"))
    found = inspect(InspectConfig(path=str(directory), format="table"))
    assert found["training"]["model"] == ARMS[arm][0].removeprefix("model=")
    assert found["training"]["step"] == 6
    assert ("provenance" in found) == (arm == "softmax_topk")
    assert inspection_table(found)


@pytest.mark.parametrize(
    ("routing", "named"),
    [
        ("router.score=sigmoid", r"router\.score=sigmoid"),
        ("balance.bias_update=0.01", r"balance\.bias_update"),
        ("router.scaling_factor=2", r"router\.scaling_factor"),
        ("router.expert_choice=true", r"router\.expert_choice"),
    ],
)
def test_what_the_type_cannot_store_is_refused_by_name(
    text: Path, text_model: Path, tmp_path: Path, routing: str, named: str
) -> None:
    made = ["model=upcycle", f"source='{text_model}'", *training.SMALL_MOE, "target=qwen2_moe", "balance.aux_loss=0"]
    training.run(training.options(text, tmp_path / "run", *made, routing))
    with pytest.raises(ConfigError, match=named):
        export(request(tmp_path / "run", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_outputs_and_runs_that_cannot_be(text: Path, text_model: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="there is no run"):
        export(request(tmp_path / "nothing", tmp_path / "out"))
    (tmp_path / "alien").mkdir()
    (tmp_path / "alien/run.json").write_text('{"lr": 1}')
    with pytest.raises(RecordError, match="not a training run of upcycle"):
        export(request(tmp_path / "alien", tmp_path / "out"))
    run = tmp_path / "run"
    training.run(training.options(text, run, f"source='{text_model}'", "model=dense", "data.held_out=0"))
    with pytest.raises(SourceError, match=r"no such checkpoint(.|\n)*take the other one with checkpoint=last"):
        export(request(run, tmp_path / "out", checkpoint="best"))
    with pytest.raises(OutputError, match="overlap"):
        export(request(run, run / "out"))
    export(request(run, tmp_path / "out"))
    with pytest.raises(OutputError, match="exists already"):
        export(request(run, tmp_path / "out"))
    (run / "checkpoints" / "last.ckpt").write_bytes(b"PK\x03\x04")
    with pytest.raises(SourceError, match="the checkpoint is damaged"):
        export(request(run, tmp_path / "out", overwrite=True))
    assert (tmp_path / "out" / "config.json").is_file()
