"""Bad input of `upcycle train`: what was wrong, and nothing half done."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
import training
from lightning.pytorch import Callback

from upcycle.errors import ConfigError, OutputError, SourceError

if TYPE_CHECKING:
    from pathlib import Path

pytest_plugins = ("text_model",)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["kernel=fastest"], "unknown kernel"),
        (["batch.micro=3"], r"batch\.micro does not divide"),
        (["batch.sequences=0"], r"batch\.micro does not divide"),
        (["log_every=0"], "log_every is out of range"),
        (["validation.every=0"], r"validation\.every"),
        (["distill.weight=2"], r"distill\.weight"),
        (["distill.temperature=0", "distill.weight=0.5"], r"distill\.temperature"),
        (["device=cuda"], "device=cuda is not there"),
        (["budget.tokens=1e3"], "exactly one unit"),
        (["schedule.final=1"], r"schedule\.final"),
        (["router.capacity_factor=0"], r"capacity_factor"),
        (["router.score=tanh"], r"router\.score"),
        (["data.held_out=12"], "held_out"),
        (["sequence_length=60", "data.files='TEXT/copy.txt'", "data.held_out=1"], "held_out"),
    ],
)
def test_options_that_cannot_work(text: Path, text_model: Path, tmp_path: Path, changes: list[str], says: str) -> None:
    given = [change.replace("TEXT", str(text)) for change in changes]
    made = ["model=upcycle", f"source='{text_model}'", *training.SMALL_MOE, *given]
    with pytest.raises(ConfigError, match=says):
        training.run(training.options(text, tmp_path / "run", *made))
    assert not (tmp_path / "run").exists()


def test_a_kernel_that_is_not_installed(
    text: Path, text_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "megablocks", None)
    made = ["model=upcycle", f"source='{text_model}'", *training.SMALL_MOE, "kernel=megablocks"]
    with pytest.raises(ConfigError, match="megablocks"):
        training.run(training.options(text, tmp_path / "run", *made))


def test_a_file_system_without_atomic_renames(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its checkpoints would be lost with the process that writes them."""

    def copying(before: Path, after: Path) -> Path:
        shutil.copytree(before, after)
        shutil.rmtree(before)
        return after

    monkeypatch.setattr("pathlib.Path.rename", copying)
    architecture = "architecture={model_type: llama, hidden_size: 16, intermediate_size: 24, num_attention_heads: 2}"
    made = ["model=scratch", architecture, "tokenizer=bytes"]
    with pytest.raises(OutputError, match="cannot rename a directory in one step"):
        training.run(training.options(text, tmp_path / "run", *made))
    assert list(tmp_path.iterdir()) == []


def test_distillation_without_a_dense_model(text: Path, tmp_path: Path) -> None:
    architecture = "architecture={model_type: llama, hidden_size: 16, intermediate_size: 24, num_attention_heads: 2}"
    made = ["model=scratch", architecture, "tokenizer=bytes", "distill.weight=0.5"]
    with pytest.raises(ConfigError, match="distillation needs a dense source"):
        training.run(training.options(text, tmp_path / "run", *made))


def test_an_output_that_is_something_else(text: Path, text_model: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    for change in ("overwrite=true", "resume=auto"):
        with pytest.raises(OutputError, match=r"exists already(.|\n)*remedy: +choose another output"):
            training.run(training.options(text, tmp_path / "run", "model=dense", f"source='{text_model}'", change))
    assert (tmp_path / "run" / "thesis.tex").read_text() == "years of work"


def test_a_full_disk_ends_training_and_keeps_the_checkpoint(
    text: Path, text_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, full = os.write, [False]

    class Fill(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            full[0] = trainer.global_step >= 3

    def limited(descriptor: int, data: Any) -> int:
        if full[0] and len(data) > 4096:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", limited)
    made = ["model=dense", f"source='{text_model}'", "checkpoint_every=2", "budget.steps=8"]
    with pytest.raises(OutputError, match="No space left"):
        training.run(training.options(text, tmp_path / "run", *made), [Fill()])
    assert training.checkpoint(tmp_path / "run")["global_step"] == 2
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"
    monkeypatch.undo()
    training.run(training.options(text, tmp_path / "run", *made, "resume=auto"))
    assert training.checkpoint(tmp_path / "run")["global_step"] == 8


def test_a_damaged_checkpoint(text: Path, text_model: Path, tmp_path: Path) -> None:
    made = ["model=dense", f"source='{text_model}'"]
    training.run(training.options(text, tmp_path / "run", *made))
    file = tmp_path / "run" / "checkpoints" / "last.ckpt"
    file.write_bytes(file.read_bytes()[:-1000])
    config = training.options(text, tmp_path / "run", *made, "resume=auto")
    with pytest.raises(SourceError, match="the checkpoint is damaged") as refusal:
        training.run(config)
    command = re.search(r"remedy: +`(cp .*?)` goes on .*, overwrite=true starts again", str(refusal.value))
    assert command
    subprocess.run(command[1], shell=True, check=True)
    training.run(config)
    assert training.checkpoint(tmp_path / "run")["global_step"] == 6
    assert [row["step"] for row in training.rows(tmp_path / "run") if "train/loss" in row] == [1, 2, 3, 4, 5, 6]


def test_a_damaged_checkpoint_alone(text: Path, text_model: Path, tmp_path: Path) -> None:
    made = ["model=dense", f"source='{text_model}'", "data.held_out=0", "budget.steps=1"]
    training.run(training.options(text, tmp_path / "run", *made))
    (tmp_path / "run" / "checkpoints" / "last.ckpt").write_bytes(b"PK")
    with pytest.raises(SourceError, match=r"damaged(.|\n)*remedy: +start again with overwrite=true$"):
        training.run(training.options(text, tmp_path / "run", *made, "resume=auto"))
    training.run(training.options(text, tmp_path / "run", *made, "overwrite=true"))
    assert training.checkpoint(tmp_path / "run")["global_step"] == 1


def test_a_damaged_record(text: Path, text_model: Path, tmp_path: Path) -> None:
    made = ["model=dense", f"source='{text_model}'"]
    training.run(training.options(text, tmp_path / "run", *made))
    (tmp_path / "run" / "run.json").write_text("{")
    with pytest.raises(SourceError, match=r"run\.json is not JSON"):
        training.run(training.options(text, tmp_path / "run", *made, "resume=auto"))
