"""A rank that fails, or is killed, ends the others with its error, and the run goes on from its last checkpoint."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import models
import pytest
import training
from launching import WORKER, on_ranks, torchrun
from test_parity import difference, job

if TYPE_CHECKING:
    from pathlib import Path

pytest_plugins = ("text_model",)
LAYOUT = "fsdp2 x ep2"
SOON = 60  # seconds


@pytest.mark.parametrize(("way", "said"), [("raise", "rank 1: out of luck"), ("kill", "another rank was killed")])
def test_others_stop_and_the_run_goes_on(way: str, said: str, text_model: Path, text: Path, tmp_path: Path) -> None:
    changes = ("checkpoint_every=1", "resume=auto")
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    file = tmp_path / "jobs.json"
    dying = {"rank": 1, "step": 2, "way": way, "noted": str(tmp_path / "died")}
    file.write_text(json.dumps([job("qwen2_moe", LAYOUT, text_model, text, broken, *changes, dies=dying)]))
    ended = torchrun(2, str(WORKER), str(file))
    assert ended.returncode != 0
    assert time.time() - float((tmp_path / "died").read_text()) < SOON
    assert said in ended.stderr
    assert json.loads((broken / "run.json").read_text())["status"] == "failed"
    jobs = [job("qwen2_moe", LAYOUT, text_model, text, run, *changes) for run in (broken, whole)]
    on_ranks(2, jobs, tmp_path)
    assert difference(broken, whole) == (0.0, 0.0)


def test_ranks_of_different_versions_are_refused(text_model: Path, text: Path, tmp_path: Path) -> None:
    file = tmp_path / "jobs.json"
    old = {"rank": 1, "package": "transformers", "version": "5.0.0"}
    file.write_text(json.dumps([job("qwen2_moe", LAYOUT, text_model, text, tmp_path / "run", runs=old)]))
    ended = torchrun(2, str(WORKER), str(file))
    assert ended.returncode != 0
    assert "the ranks run different versions" in ended.stderr
    assert "on rank 0, 5.0.0 on rank 1" in ended.stderr
    assert not (tmp_path / "run").exists()


def test_a_family_without_a_plan_is_refused(text_model: Path, text: Path, tmp_path: Path) -> None:
    gpt2 = models.save(models.build("gpt2", vocab_size=300), tmp_path / "gpt2")
    for file in text_model.glob("tokenizer*"):
        (gpt2 / file.name).write_bytes(file.read_bytes())
    given = ("model=upcycle", f"source={gpt2}", f"output={tmp_path / 'run'}", "parallel=tp_ep", "moe.granularity=1")
    ended = torchrun(2, "--no-python", "upcycle", "train", *given, "moe.top_k=1", *training.overrides(text))
    assert ended.returncode != 0
    assert "upcycle: the model cannot be laid out over the ranks like this" in ended.stderr
    assert "tp_plan" in ended.stderr
    assert not (tmp_path / "run").exists()


def test_several_processes_need_a_layout(text_model: Path, text: Path, tmp_path: Path) -> None:
    given = [f"source={text_model}", "model=dense", f"output={tmp_path / 'run'}", *training.overrides(text)]
    ended = torchrun(2, "--no-python", "upcycle", "train", *given)
    assert ended.returncode != 0
    assert "several processes were started, and nothing says how they share the model" in ended.stderr
    assert not (tmp_path / "run").exists()
