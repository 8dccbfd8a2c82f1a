"""Training with a mirror: what becomes of it at the server, and that W&B never costs a run anything."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import time
from typing import TYPE_CHECKING, Any

import pandas as pd
import pytest
import training
import wandb
import wandb_records as made
from cli import command
from ended import Ended
from lightning.pytorch import Callback

from upcycle.analysis.runs import load_runs
from upcycle.tracking import wandb_mirror
from upcycle.tracking.record import read_run

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from wandb_server import Server

pytest_plugins = ("text_model",)


class At(Callback):
    """Does something after so many optimizer steps."""

    def __init__(self, step: int, action: Callable[[], object]) -> None:
        self._step, self._action = step, action

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self._step:
            self._action()


@pytest.fixture
def train(text: Path, text_model: Path, tmp_path: Path) -> Callable[..., Path]:
    """Trains for six steps, and returns the run's directory."""

    def start(*changes: str, callbacks: tuple[Callback, ...] = ()) -> Path:
        given = ("model=dense", f"source='{text_model}'", "resume=auto", *changes)
        training.run(training.options(text, tmp_path / "run", *given), callbacks)
        return tmp_path / "run"

    return start


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_terminated_run_goes_on_where_it_was(server: Server, train: Callable[..., Path]) -> None:
    directory = train("wandb.mode=online", callbacks=(At(3, terminate),))
    (kept,) = server.runs.values()
    assert (kept.exit_code, kept.summary["status"]) == (1, "interrupted")
    assert made.shown(kept.history) == made.rows(directory)
    train("wandb.mode=online")
    assert list(server.runs.values()) == [kept]
    assert (kept.exit_code, kept.summary["status"]) == (0, "finished")
    assert made.shown(kept.history) == made.rows(directory)
    assert made.rows(directory)[-1]["step"] == 6


def test_experts_and_options_arrive(server: Server, train: Callable[..., Path], text_model: Path) -> None:
    directory = train("wandb.mode=online", "wandb.group=order", "model=upcycle", *training.SMALL_MOE)
    (kept,) = server.runs.values()
    assert kept.group == "order"
    assert kept.config["config"]["value"]["moe"]["granularity"] == 2
    assert kept.config["order_hash"]["value"] == read_run(directory)["order_hash"]
    loads = [row["moe/layer_0/load"] for row in kept.history if "moe/layer_0/load" in row]
    assert [len(load["values"]) for load in loads] == [4] * 6
    assert made.shown(kept.history) == made.rows(directory)


def test_analysis_reads_the_mirror_as_the_record(client: pytest.MonkeyPatch, train: Callable[..., Path]) -> None:
    directory = train("wandb.mode=offline", "model=upcycle", *training.SMALL_MOE)
    record, mirror = (load_runs(*places).drop(columns="run") for places in ([directory], offline(directory)))
    pd.testing.assert_frame_equal(record, mirror, check_like=True, check_dtype=False, check_categorical=False)


def offline(directory: Path) -> list[Path]:
    return sorted(directory.glob("wandb/offline-run-*"))


@pytest.mark.slow
def test_killed_and_started_again(client: pytest.MonkeyPatch, text: Path, text_model: Path, tmp_path: Path) -> None:
    """SIGKILL at an arbitrary moment costs the mirror nothing and doubles nothing."""
    output = tmp_path / "run"
    given = ("model=dense", f"source={text_model}", f"output={output}", "resume=auto", "wandb.mode=offline")
    line = command(
        "train", *training.overrides(text), *given, "budget.steps=20", "validation.every=20", "checkpoint_every=5"
    )
    with Ended(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as started:
        while started.poll() is None and not (output / "checkpoints" / "last.ckpt").exists():
            time.sleep(0.01)
    assert read_run(output)["status"] == "running"
    subprocess.run(line, check=True, capture_output=True)
    assert len(offline(output)) == 2
    assert made.shown(made.offline_history(output)) == made.rows(output)
    assert made.rows(output)[-1]["step"] == 20


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Our warnings; a test of the command before this one may have switched on what is less."""
    return [each.message for each in caplog.records if each.name == "upcycle" and each.levelno >= logging.WARNING]


def assert_trained_alone(directory: Path, lines: list[str]) -> None:
    """The record is whole, and one line says what became of the mirror."""
    assert read_run(directory)["status"] == "finished"
    assert made.rows(directory)[-1]["step"] == 6
    (line,) = lines
    assert f"upcycle sync {directory}" in line
    assert "\n" not in line


def test_nobody_answers(
    client: pytest.MonkeyPatch, train: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    client.setattr(wandb_mirror, "START_SECONDS", 0.5)
    assert_trained_alone(train("wandb.mode=online"), said(caplog))


def test_the_key_is_wrong(server: Server, train: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    server.status = 401
    assert_trained_alone(train("wandb.mode=online"), said(caplog))


def test_the_key_is_malformed(
    client: pytest.MonkeyPatch, train: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    client.setenv("WANDB_API_KEY", "short")
    wandb.teardown()
    assert_trained_alone(train("wandb.mode=online"), said(caplog))


def test_there_is_no_key(
    client: pytest.MonkeyPatch, train: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    client.delenv("WANDB_API_KEY")
    wandb.teardown()
    assert_trained_alone(train("wandb.mode=online"), said(caplog))


def test_the_server_goes_away(
    server: Server, client: pytest.MonkeyPatch, train: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    client.setattr(wandb_mirror, "FINISH_SECONDS", 1.0)

    def leave() -> None:
        server.status = 503

    directory = train("wandb.mode=online", callbacks=(At(2, leave),))
    assert_trained_alone(directory, [line for line in said(caplog) if not line.startswith("W&B: ")])
    assert read_run(directory)["wandb"]["rows"] == 0


def test_a_client_that_breaks_costs_nothing(
    server: Server, client: pytest.MonkeyPatch, train: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ConnectionResetError("Connection lost")

    client.setattr(wandb.Run, "log", broken)
    directory = train("wandb.mode=online")
    assert_trained_alone(directory, [line for line in said(caplog) if not line.startswith("W&B: ")])
