"""An interrupted run ends as the uninterrupted one: weights, optimizer and record bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import training
from cli import command
from lightning.pytorch import Callback

from upcycle.data.order import PositionSampler
from upcycle.errors import ConfigError, OutputError
from upcycle.train import fit

if TYPE_CHECKING:
    from pathlib import Path

pytest_plugins = ("text_model",)

STEPS = 8
# Everything that has state: two micro-batches, noise, the bias of aux-free balancing, warm-up, held-out losses.
STATEFUL = (
    *training.SMALL_MOE,
    "model=upcycle",
    f"budget.steps={STEPS}",
    "router.jitter=0.1",
    "router.noisy_top_k=true",
    "balance.bias_update=0.01",
    "balance.statistics=global_batch",
    "schedule.warmup=2",
    "log_every=2",
    "checkpoint_every=3",
    "metrics=dense",
)


class At(Callback):
    """Does something after so many optimizer steps."""

    def __init__(self, step: int, action: Any) -> None:
        self._step, self._action = step, action

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self._step:
            self._step = -1
            self._action()


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def fail() -> None:
    raise RuntimeError("pulled the plug")


@pytest.fixture(scope="module")
def whole(text: Path, text_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run."""
    output = tmp_path_factory.mktemp("whole") / "run"
    training.run(training.options(text, output, *STATEFUL, f"source='{text_model}'"))
    return output


def assert_same(one: Path, other: Path) -> None:
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert training.differing_tensors(training.checkpoint(one)[part], training.checkpoint(other)[part]) == []
    assert training.checkpoint(one)["lr_schedulers"] == training.checkpoint(other)["lr_schedulers"]
    assert training.rows(one) == training.rows(other)


@pytest.mark.parametrize("step", [1, 3, 4, 6])
def test_sigterm_saves_and_resumes(text: Path, text_model: Path, whole: Path, tmp_path: Path, step: int) -> None:
    config = training.options(text, tmp_path / "run", *STATEFUL, f"source='{text_model}'", "resume=auto")
    training.run(config, [At(step, terminate)])
    assert training.checkpoint(tmp_path / "run")["global_step"] == step
    training.run(config)
    assert_same(tmp_path / "run", whole)


def test_a_crash_resumes_from_the_last_checkpoint(text: Path, text_model: Path, whole: Path, tmp_path: Path) -> None:
    config = training.options(text, tmp_path / "run", *STATEFUL, f"source='{text_model}'", "resume=auto")
    with pytest.raises(RuntimeError, match="pulled the plug"):
        training.run(config, [At(5, fail)])
    assert training.checkpoint(tmp_path / "run")["global_step"] == 3
    training.run(config)
    assert_same(tmp_path / "run", whole)


def test_a_wrong_position_in_the_data_is_noticed(
    text: Path, text_model: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mutant: a run that starts the data again when it is resumed."""
    config = training.options(text, tmp_path / "run", *STATEFUL, f"source='{text_model}'", "resume=auto")
    training.run(config, [At(4, terminate)])
    monkeypatch.setattr(
        fit, "PositionSampler", lambda order, **options: PositionSampler(order, **{**options, "start": 0})
    )
    training.run(config)
    with pytest.raises(AssertionError):
        assert_same(tmp_path / "run", whole)


def test_sigkill(text: Path, text_model: Path, whole: Path, tmp_path: Path) -> None:
    """The command, killed at an arbitrary moment, and again."""
    output = tmp_path / "run"
    line = command(
        "train", *training.overrides(text), *STATEFUL, f"source={text_model}", f"output={output}", "resume=auto"
    )
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # as in this process: sums depend on it
    for _ in range(2):
        process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=one_thread)
        before = len(lines(output))
        while len(lines(output)) < before + 2 and process.poll() is None:
            time.sleep(0.02)
        process.kill()
        process.wait()
    ended = subprocess.run(line, capture_output=True, text=True, check=False, env=one_thread)
    assert ended.returncode == 0, ended.stderr
    assert_same(output, whole)


def lines(output: Path) -> list[str]:
    file = output / "metrics.jsonl"
    return file.read_text().splitlines() if file.exists() else []


def test_a_finished_run_has_nothing_left(text: Path, text_model: Path, whole: Path) -> None:
    before = training.checkpoint(whole)
    config = training.options(text, whole, *STATEFUL, f"source='{text_model}'", "resume=auto")
    training.run(config)
    assert training.differing_tensors(before, training.checkpoint(whole)) == []


def test_an_output_that_exists_is_refused(text: Path, text_model: Path, whole: Path) -> None:
    with pytest.raises(OutputError, match="resume=auto"):
        training.run(training.options(text, whole, *STATEFUL, f"source='{text_model}'"))


def test_other_options_are_refused_by_name(text: Path, text_model: Path, whole: Path) -> None:
    config = training.options(text, whole, *STATEFUL, f"source='{text_model}'", "resume=auto")
    other = replace(config, seed=1, optim=replace(config.optim, clip=2.0))
    with pytest.raises(ConfigError, match=r"optim\.clip=2\.0 \(was 1\.0\), seed=1 \(was 0\)"):
        training.run(other)


def test_overwrite_starts_again(text: Path, text_model: Path, whole: Path, tmp_path: Path) -> None:
    config = training.options(text, tmp_path / "run", *STATEFUL, f"source='{text_model}'", "overwrite=true")
    training.run(config, [At(3, terminate)])
    training.run(config)
    assert_same(tmp_path / "run", whole)


def test_checkpoints_hold_no_code(whole: Path) -> None:
    assert torch.load(whole / "checkpoints" / "best.ckpt", weights_only=True)["global_step"] <= STEPS
