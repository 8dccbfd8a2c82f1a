"""A sweep through submitit's SLURM executor, on two "nodes" of this machine: the results of one process."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import time
from typing import TYPE_CHECKING, Any

import fake_slurm
import psutil
import pytest
import questions
import training
from cli import Outcome, command
from ended import Ended

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
pytest_plugins = ("text_model", "tiny")
DEADLINE = 300  # seconds
STEPS = 30
TOLERANCE = 5e-6  # of losses between layouts, as in tests/distributed
TWO_NODES = ["hydra/launcher=slurm", "hydra.launcher.nodes=2", "hydra.launcher.partition=gpu", "parallel=fsdp"]


@pytest.fixture(scope="module")
def sweep(text_model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two arms, with what makes a run comparable over layouts; see tests/distributed/test_parity.py."""
    arms: dict[str, Any] = {"two": [], "four": ["moe.top_k=4"]}
    model = {"moe": {"expansion": 8, "granularity": 1, "top_k": 2}, "init": {"router_std": 0.1}}
    mine = questions.own(tmp_path_factory.mktemp("own"), sweep={"arms": arms}, **model)
    training = ["optim.eps=1e-3", "balance.statistics=global_batch", f"budget.steps={STEPS}", "budget.flops=null"]
    every = ["checkpoint_every=1", "validation.every=10"]
    return ["train", "-m", *mine, *questions.shipped("mine", text), f"source='{text_model}'", *training, *every]


@pytest.fixture(scope="module")
def machines(sweep: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Outcome]]:
    """The sweep on one process, which two machines start at once with one output; and how they ended."""
    output = tmp_path_factory.mktemp("serial")
    with start(*sweep, f"output={output}") as one, start(*sweep, f"output={output}") as other:
        return output, [end(each) for each in (one, other)]


@pytest.fixture(scope="module")
def serial(machines: tuple[Path, list[Outcome]]) -> dict[str, Path]:
    return questions.runs(machines[0], "mine")


def start(*arguments: str, **environment: str) -> Ended[str]:
    pipe = subprocess.PIPE
    return Ended(command(*arguments), env=os.environ | environment, stdout=pipe, stderr=pipe, text=True)


def end(sweep: Ended[str]) -> Outcome:
    out, err = sweep.communicate(timeout=DEADLINE)
    return Outcome(status=sweep.returncode, out=out, err=err)


def wait_for(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.02)


def stopped_at(run: Path) -> int:
    """The step after which the run saved its checkpoint for a signal."""
    said = [line for line in run.with_name(f"{run.name}.log").read_text().splitlines() if "stopped by" in line]
    assert len(said) == 1, said
    return int(said[0].split("after step ")[1].split(":")[0])


def starts(run: Path) -> int:
    """How often a run was started: it says each time which kernel it takes."""
    return run.with_name(f"{run.name}.log").read_text().count("kernel")


@pytest.mark.slow
def test_two_machines_with_one_output_run_nothing_twice(machines: tuple[Path, list[Outcome]]) -> None:
    output, ended = machines
    assert [each.status for each in ended] == [0, 0], ended
    assert ended[0].out == ended[1].out
    assert [starts(run) for run in questions.runs(output, "mine").values()] == [1, 1]


@pytest.mark.slow
def test_two_nodes_and_a_requeue_are_one_process(sweep: list[str], serial: dict[str, Path], tmp_path: Path) -> None:
    """One job is near to its limit in the middle of its run: it saves, is requeued and killed, and goes on."""
    slurm, output = tmp_path / "slurm", tmp_path / "runs"
    environment = fake_slurm.install(slurm)
    given = [*sweep, f"output={output}", *TWO_NODES]
    interrupted = output / serial["two"].name
    with start(*given, **environment) as started:
        wait_for((interrupted / "run.json").exists)
        job = next(name for name, each in fake_slurm.jobs(slurm).items() if name.endswith("_0"))
        wait_for((interrupted / "checkpoints/last.ckpt").exists)
        fake_slurm.signal_tasks(slurm, job)
        ended = end(started)
    assert ended.status == 0, ended
    assert 0 < stopped_at(interrupted) < STEPS
    assert starts(interrupted) == 2
    submitted = fake_slurm.jobs(slurm)
    assert {name.partition("_")[2]: each["begun"] for name, each in submitted.items()} == {"0": 2, "1": 1}
    parameters = submitted[job]["given"]
    expected = {"array": "0-1%2", "nodes": "2", "ntasks-per-node": "1", "partition": "gpu", "signal": "USR2@180"}
    assert expected.items() <= parameters.items()
    assert "requeue" in parameters
    for arm, run in questions.runs(output, "mine").items():
        record = json.loads((run / "run.json").read_text())
        assert record["status"] == "finished"
        assert len(record["ranks"]) == 2
        mine, theirs = training.rows(run), training.rows(serial[arm])
        assert [row["step"] for row in mine] == [row["step"] for row in theirs]
        for one, other in zip(mine, theirs, strict=True):
            for name in {"train/loss", "val/loss"} & other.keys():
                assert abs(one[name] - other[name]) < TOLERANCE, (arm, name, one["step"])
    with start(*given, **environment) as started:
        again = end(started)
    assert (again.status, again.out) == (0, ended.out)
    assert fake_slurm.jobs(slurm) == submitted


@pytest.mark.slow
def test_submitit_requeues_a_local_job(sweep: list[str], serial: dict[str, Path], tmp_path: Path) -> None:
    """Its local executor starts the job again, as SLURM does; the record is bit for bit the uninterrupted one's."""
    arm = [each for each in sweep if each != "-m"]
    given = [*arm, "+arm=two", "seed=0", f"output={tmp_path}", "hydra/launcher=submitit_local"]
    run = tmp_path / serial["two"].name
    with start(*given) as started:
        wait_for((run / "run.json").exists)
        below = psutil.Process(started.pid).children(recursive=True)
        (task,) = [each for each in below if "submitit.core._submit" in each.cmdline()]
        wait_for((run / "checkpoints/last.ckpt").exists)
        task.send_signal(fake_slurm.signal.SIGUSR2)
        ended = end(started)
    assert ended.status == 0, ended
    assert 0 < stopped_at(run) < STEPS
    assert training.rows(run) == training.rows(serial["two"])


@pytest.mark.parametrize(
    "given",
    [["parallel=fsdp"], ["parallel=fsdp", "hydra/launcher=slurm"], [*TWO_NODES[:3]]],
    ids=["no launcher", "one task", "no layout"],
)
def test_the_launcher_has_to_start_the_ranks(
    given: list[str], sweep: list[str], upcycle: Callable[..., Outcome], tmp_path: Path
) -> None:
    ended = upcycle(*sweep, f"output={tmp_path / 'runs'}", *given)
    ended.refused(
        "a sweep starts the ranks of its runs", found="parallel=" + ("fsdp" if "=fsdp" in given[0] else "null")
    )
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["parallel=ep", "hydra.launcher.tasks_per_node=8", "batch.sequences=16"], "more ranks than experts"),
        (["parallel.fsdp=3"], "no layout of these options has that many ranks"),
        (["batch.sequences=4", "batch.micro=4"], "batch.micro does not divide batch.sequences for 2 ranks"),
        (["parallel=folding"], "which upcycle train does not run"),
    ],
)
def test_a_layout_that_cannot_be_is_said_before_anything_is_submitted(
    given: list[str], said: str, sweep: list[str], upcycle: Callable[..., Outcome], tmp_path: Path
) -> None:
    for start in (["train", "-m"], ["plan-sweep"]):
        ended = upcycle(*start, *sweep[2:], f"output={tmp_path / 'runs'}", *TWO_NODES, *given)
        ended.refused("2 of 2 arms are not valid", said)
    assert not (tmp_path / "runs").exists()


def test_torchrun_does_not_start_a_sweep(
    sweep: list[str], upcycle: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    ended = upcycle(*sweep, f"output={tmp_path / 'runs'}", *TWO_NODES)
    ended.refused("a sweep starts the ranks of its runs", found="torchrun starts the sweep", remedy="hydra/launcher=")


@pytest.mark.parametrize("launcher", ["slurm", "submitit_local"])
def test_a_launcher_that_is_not_installed(launcher: str, sweep: list[str], tmp_path: Path) -> None:
    without = "import sys; sys.modules['hydra_plugins.hydra_submitit_launcher'] = None; "
    python, option, main = command()
    given = [python, option, without + main, *sweep, f"output={tmp_path / 'runs'}", f"hydra/launcher={launcher}"]
    ended = subprocess.run(given, capture_output=True, text=True, check=False)
    outcome = Outcome(status=ended.returncode, out=ended.stdout, err=ended.stderr)
    outcome.refused("the launcher is not installed", found="submitit_", remedy='pip install "upcycle[sweep]"')
    assert not (tmp_path / "runs").exists()


def test_a_file_system_without_locks(
    sweep: list[str], upcycle: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_descriptor: int, _how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    ended = upcycle(*sweep, f"output={tmp_path / 'runs'}")
    ended.refused("cannot lock", found="No locks available", remedy="choose an output on a file system that has them")
    assert not [each for each in (tmp_path / "runs").iterdir() if not each.name.startswith(".")]


def test_a_file_system_without_atomic_renames(
    sweep: list[str], upcycle: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake_slurm.Path, "rename", refuse_rename)
    ended = upcycle(*sweep, f"output={tmp_path / 'runs'}")
    ended.refused("cannot rename a directory in one step", found="Operation not supported")
    assert not (tmp_path / "runs").exists()


def refuse_rename(before: Path, _after: Path) -> Path:
    raise OSError(errno.EOPNOTSUPP, "Operation not supported", str(before))
