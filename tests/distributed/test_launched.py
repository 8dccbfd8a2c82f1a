"""How many processes there are: what torchrun, srun and a job of SLURM say of it, and one process among them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import training

from upcycle.distributed.ranks import ALONE, join_ranks
from upcycle.errors import ConfigError
from upcycle.parallel.config import ParallelConfig

if TYPE_CHECKING:
    from pathlib import Path

pytest_plugins = ("text_model",)
FSDP = ParallelConfig(fsdp=2, ep=1, tp=1, replicate=1)
CPU = torch.device("cpu")
# The script of a job, before srun; what srun starts has a step.
JOB = {"SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2", "SLURM_NNODES": "1", "SLURM_PROCID": "0"}
STEP = {**JOB, "SLURM_STEP_ID": "0", "SLURM_NTASKS_PER_NODE": "2", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
ONE_OF_STEP = {**STEP, "SLURM_NTASKS": "1"}  # srun --ntasks=1 in a job with two tasks per node
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}


@pytest.fixture(autouse=True)
def _no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*STEP, *TORCHRUN):
        monkeypatch.delenv(name, raising=False)


def give(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("variables", "found", "one"),
    [
        (
            STEP,
            r"2 processes \(SLURM_NTASKS=2 of srun\), parallel=null",
            "srun --ntasks=1 .* SLURM_NTASKS=1 upcycle train",
        ),
        (TORCHRUN, r"2 processes \(torchrun's WORLD_SIZE=2\), parallel=null", "start one without torchrun"),
    ],
)
def test_several_without_a_layout(
    variables: dict[str, str], found: str, one: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    give(monkeypatch, variables)
    with pytest.raises(ConfigError, match=rf"several processes(.|\n)*{found}\n  remedy: .*parallel=fsdp.*, or .*{one}"):
        join_ranks(None, CPU)


@pytest.mark.parametrize("variables", [{}, JOB, ONE_OF_STEP], ids=["nobody", "a job's script", "srun --ntasks=1"])
def test_a_layout_of_one_process(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, variables)
    with pytest.raises(ConfigError, match=r"one process(.|\n)*srun upcycle train") as refusal:
        join_ranks(FSDP, CPU)
    assert ("srun did not start it; the job's SLURM_NTASKS=2" in str(refusal.value)) == (variables is JOB)


def test_a_step_without_tasks_per_node(monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, {name: value for name, value in STEP.items() if name != "SLURM_NTASKS_PER_NODE"})
    with pytest.raises(ConfigError, match=r"how many tasks a node has\n.*SLURM_NTASKS=2.*\n.*srun --ntasks-per-node=2"):
        join_ranks(FSDP, CPU)


def test_an_interactive_job(monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, {**STEP, "SLURM_JOB_NAME": "interactive"})
    assert join_ranks(None, CPU) is ALONE


@pytest.mark.parametrize("variables", [JOB, ONE_OF_STEP], ids=["a job's script", "srun --ntasks=1"])
def test_one_process_trains(
    variables: dict[str, str],
    text_model: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Nothing in Lightning takes it for one of two either, and what it took the process for is said."""
    give(monkeypatch, variables)
    changes = ("model=dense", f"source='{text_model}'", "budget.steps=1")
    with caplog.at_level("INFO", "upcycle"):
        training.run(training.options(text, tmp_path / "run", *changes))
    assert [row["step"] for row in training.rows(tmp_path / "run") if "train/loss" in row] == [1]
    assert any("srun did not start it" in message for message in caplog.messages) == (variables is JOB)
