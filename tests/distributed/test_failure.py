"""A rank that fails, or is killed, ends the others with its error, and the run goes on from its last checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import training
from cli import command
from launching import SOON, WORKER, on_ranks, srun, torchrun
from safetensors.torch import load_file, save_file
from test_parity import difference, job
from torch.distributed import HashStore
from torch.distributed.checkpoint.api import CheckpointException, _wrap_exception

from upcycle.distributed import failure, shards
from upcycle.distributed.ranks import Ranks
from upcycle.errors import SourceError
from upcycle.parallel.rank_layout import RankLayout

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytest_plugins = ("text_model",)
LAYOUT = "fsdp2 x ep2"
TWO = Ranks(layout=RankLayout(fsdp=2))


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


def test_a_rank_that_cannot_read_its_slices_ends_the_others(text_model: Path, text: Path, tmp_path: Path) -> None:
    """Before training, and where nothing but the broken connection tells the others."""
    source = shutil.copytree(text_model, tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    weights["model.layers.1.mlp.gate_proj.weight"][-1] = float("nan")  # of the last expert
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    given = ("model=upcycle", f"source={source}", f"output={tmp_path / 'run'}", "parallel=ep", "moe.expansion=1")
    given = (*given, "moe.granularity=2", "moe.top_k=2", *training.overrides(text))
    first, second = srun(2, *command("train", *given))
    assert second.returncode == first.returncode == 1
    found = "NaN or infinity in model.layers.1.mlp.gate_proj.weight"
    assert f"upcycle: {found}" in second.stderr
    assert f"upcycle: another rank failed\n  found:    rank 1: {found}" in first.stderr
    assert not (tmp_path / "run").exists()


def test_rank_0_is_lost_with_the_store(text_model: Path, text: Path, tmp_path: Path) -> None:
    file = tmp_path / "jobs.json"
    dying = {"rank": 0, "step": 2, "way": "kill", "noted": str(tmp_path / "died")}
    file.write_text(json.dumps([job("qwen2_moe", LAYOUT, text_model, text, tmp_path / "run", dies=dying)]))
    first, second = srun(2, sys.executable, str(WORKER), str(file))
    assert first.returncode == -signal.SIGKILL
    assert "OtherRankError: rank 0 is gone" in second.stderr


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[HashStore]:
    """The store of a process group of two ranks, of which this process is the first."""
    store, before = HashStore(), signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(failure, "_get_default_store", lambda: store)
    yield store
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("NCCL error: unhandled cuda error"), None),
        (RuntimeError("NCCL error in: remote process exited or there was a network error"), "another rank was killed"),
        (RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:1"), "another rank was killed"),
    ],
)
def test_an_error_of_its_own_is_shared(error: RuntimeError, said: str | None, store: HashStore) -> None:
    raised = pytest.raises(failure.OtherRankError if said else SourceError, match=said or "cannot be loaded")
    with raised, failure.shared_failure(TWO):
        raise SourceError("cannot be loaded") from error
    assert store.check([failure.FAILED]) == (said is None)


@pytest.mark.parametrize("action", [shards.writing, partial(shards.reading, remedy="none")], ids=["writing", "reading"])
def test_a_checkpoint_breaks_off_when_a_rank_is_gone(action: Any, store: HashStore, tmp_path: Path) -> None:
    store.set(failure.FAILED, "rank 1: out of luck")
    gone = _wrap_exception(RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:1"))
    raised = pytest.raises(failure.OtherRankError, match="rank 1: out of luck")
    with raised, failure.shared_failure(TWO), action(tmp_path):
        raise CheckpointException("a collective", {0: gone})


@pytest.mark.parametrize("when", ["between two collectives", "after a broken connection"])
def test_a_rank_that_is_ended_says_why(when: str, store: HashStore) -> None:
    """torchrun sends SIGTERM to the others as soon as one has failed."""
    store.set(failure.FAILED, "rank 1: out of luck")

    def work() -> None:
        try:
            if when == "after a broken connection":
                raise RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:1")
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(failure.OtherRankError, match="rank 1: out of luck"), failure.shared_failure(TWO):
        work()
    os.kill(os.getpid(), signal.SIGTERM)  # while it says so


def test_a_rank_that_is_ended_alone_leaves_word(store: HashStore) -> None:
    with pytest.raises(SystemExit), failure.shared_failure(TWO):
        os.kill(os.getpid(), signal.SIGTERM)
    assert store.get(failure.FAILED) == b"rank 0: stopped by SIGTERM"


def test_nothing_is_left_behind(store: HashStore) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with failure.shared_failure(TWO):
        pass
    assert signal.getsignal(signal.SIGTERM) is before


def test_ranks_of_different_versions_are_refused(text_model: Path, text: Path, tmp_path: Path) -> None:
    file = tmp_path / "jobs.json"
    old = {"rank": 1, "package": "transformers", "version": "5.0.0"}
    file.write_text(json.dumps([job("qwen2_moe", LAYOUT, text_model, text, tmp_path / "run", runs=old)]))
    ended = torchrun(2, str(WORKER), str(file))
    assert ended.returncode != 0
    assert "the ranks run different versions" in ended.stderr
    assert "on rank 0, 5.0.0 on rank 1" in ended.stderr
    assert not (tmp_path / "run").exists()


def test_several_processes_need_a_layout(text_model: Path, text: Path, tmp_path: Path) -> None:
    given = [f"source={text_model}", "model=dense", f"output={tmp_path / 'run'}", *training.overrides(text)]
    ended = torchrun(2, "--no-python", "upcycle", "train", *given)
    assert ended.returncode != 0
    assert "several processes were started, and nothing says how they share the model" in ended.stderr
    assert not (tmp_path / "run").exists()
