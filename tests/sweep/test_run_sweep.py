"""Sweeps that finish: what is finished is skipped, what was killed goes on, what fails costs nothing but itself."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import questions
from cli import command, process
from ended import Ended
from pydantic import TypeAdapter

from upcycle.sweep.check import estimate
from upcycle.train.config import TrainConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from cli import Outcome

pytest_plugins = ("text_model", "tiny")
DEADLINE = 300  # seconds
JOBLIB = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]


def steps(run: Path) -> list[int]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [row["step"] for row in map(json.loads, lines) if "train/loss" in row]


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_shipped_sweep_runs_and_is_not_run_again(
    upcycle: Callable[..., Outcome], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ("train", "-m", *questions.shipped("layers", text), f"output={tmp_path / 'runs'}", "wandb.tags=[mine]")
    first = upcycle(*given)
    assert first.status == 0, first.out + first.err
    runs = questions.runs(tmp_path / "runs", "layers")
    assert list(runs) == ["baseline", "layers=every_2", "layers=[0]"]
    for arm, run in runs.items():
        record = json.loads((run / "run.json").read_text())
        assert record["status"] == "finished"
        assert record["config"]["wandb"]["group"] == "layers"
        assert record["config"]["wandb"]["tags"] == ["mine", "sweep:layers", f"arm:{arm}"]
        assert record["config"]["moe"]["layers"] == {"baseline": "all", "layers=[0]": [0]}.get(arm, "every_2")
        assert f"{record['summary']['val/loss']:.4f}" in first.out
        flops = f"{record['summary']['train/flops']:.3g}"
        # What the plan said before: steps of every arm, in its row.
        assert re.search(rf" {record['steps']} +[\d.e-]+ +{re.escape(flops)}", first.err)
        last, best = ((run / f"checkpoints/{name}.ckpt").stat().st_size for name in ("last", "best"))
        planned = estimate(TypeAdapter(TrainConfig).validate_python(record["config"]), ranks=1, execute=False)
        assert last == pytest.approx(planned.disk / 2, rel=0.05)
        assert best < 1.01 * last  # the one of step 0 has no moments yet
    before = {run: (run / "run.json").stat().st_mtime_ns for run in runs.values()}
    monkeypatch.setattr("upcycle.sweep.command.free_bytes", lambda _output: 1000)  # they filled the disk
    again = upcycle(*given)
    assert again.status == 0
    assert again.out == first.out
    assert "3 finished" in again.err
    assert {run: (run / "run.json").stat().st_mtime_ns for run in runs.values()} == before
    packed = upcycle("pack", tmp_path / "runs")
    assert f"kept    {runs['baseline']}: it holds checkpoints, model besides the record" in packed.out
    for run in runs.values():
        shutil.rmtree(run)
    from_pack = upcycle(*given)
    assert (from_pack.status, from_pack.out) == (0, first.out)
    assert "3 finished" in from_pack.err
    assert not any(run.exists() for run in runs.values())


@contextmanager
def started(given: list[str], place: Path) -> Iterator[Ended[bytes]]:
    """A sweep in a session of its own; left, it is killed."""
    with (
        (place / "log").open("wb") as log,
        Ended(command(*given), stdout=log, stderr=log, cwd=place, start_new_session=True) as sweep,
    ):
        yield sweep


@pytest.mark.slow
def test_a_killed_sweep_goes_on_where_it_stood(upcycle: Callable[..., Outcome], text: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle of the second run: the first is kept, the second resumes, the others start."""
    output = tmp_path / "runs"
    given = ["train", "-m", *questions.shipped("capacity", text), f"output={output}", "budget.flops=2e10"]

    def in_the_second(sweep: Ended[bytes]) -> bool:
        assert sweep.poll() is None
        index = output / "capacity.json"
        second = list(questions.runs(output, "capacity").values())[1] if index.exists() else None
        return bool(second and (second / "checkpoints/last.ckpt").exists())

    with started(given, tmp_path) as sweep:
        wait_for(lambda: in_the_second(sweep))
    first, second, third, _ = questions.runs(output, "capacity").values()
    wait_for(lambda: questions.status(second) != "running")
    assert (questions.status(first), questions.status(third)) == ("finished", None)
    kept, reached = (first / "run.json").stat().st_mtime_ns, steps(second)
    again = upcycle(*given)
    assert again.status == 0, again.out + again.err
    assert (first / "run.json").stat().st_mtime_ns == kept
    assert [questions.status(run) for run in questions.runs(output, "capacity").values()] == ["finished"] * 4
    assert steps(second)[: len(reached)] == reached
    assert steps(second) == list(range(1, len(steps(first)) + 1))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [[], JOBLIB], ids=["serial", "joblib"])
def test_a_sweep_that_is_told_to_end_leaves_no_process(launcher: list[str], text: Path, tmp_path: Path) -> None:
    output = tmp_path / "runs"
    given = ["train", "-m", *questions.shipped("capacity", text), f"output={output}", "budget.flops=1e12", *launcher]
    with started(given, tmp_path) as sweep:
        wait_for(lambda: any(output.glob("*/checkpoints/last.ckpt")))
        below = psutil.Process(sweep.pid).children(recursive=True)
        assert below
        sweep.terminate()
        assert sweep.wait(timeout=DEADLINE) == 128 + signal.SIGTERM
    wait_for(lambda: not any(process.is_running() for process in below))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "retries"),
    [
        ([], 1),
        (JOBLIB, 0),
        (["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5"], 0),
    ],
    ids=["serial", "joblib", "submitit"],
)
def test_a_failure_costs_only_itself(
    launcher: list[str], retries: int, upcycle: Callable[..., Outcome], text: Path, tmp_path: Path
) -> None:
    """A learning rate that makes the loss infinite: tried again as often as asked, then listed with its last words."""
    for given in launcher[:1]:
        pytest.importorskip(f"hydra_plugins.hydra_{given.partition('=')[2].removesuffix('_local')}_launcher")
    arms: dict[str, Any] = {"explodes": ["schedule.peak=1e30", "optim.clip=null"], "works": []}
    mine = questions.own(tmp_path, sweep={"arms": arms})
    given = [
        *mine,
        *questions.shipped("mine", text),
        f"output={tmp_path / 'runs'}",
        f"sweep.retries={retries}",
        *launcher,
    ]
    ended = upcycle("train", "-m", *given)
    assert ended.status == 1
    runs = questions.runs(tmp_path / "runs", "mine")
    assert {arm: questions.status(run) for arm, run in runs.items()} == {"explodes": "failed", "works": "finished"}
    assert "1 of 2 runs did not finish; the same command goes on with them:" in ended.out
    assert f"\nexplodes, seed 0 (failed): {runs['explodes']}\n" in ended.out
    last_words = ended.out[ended.out.index(str(runs["explodes"])) :]
    assert "finite" in last_words
    log = runs["explodes"].with_name(runs["explodes"].name + ".log").read_text()
    assert log.count("lower schedule.peak") == 1 + retries


FAIL_ONCE = """
import os, pathlib, sys
if "upcycle.sweep.worker" in sys.orig_argv:
    try:
        pathlib.Path(os.environ["FAILED"]).touch(exist_ok=False)
    except FileExistsError:
        pass
    else:
        os.write(2, b"failed once\\n")
        os._exit(1)
"""


@pytest.mark.slow
def test_joblib_tries_again(text: Path, tmp_path: Path) -> None:
    """The first process that trains anything fails, whichever arm's it is."""
    (tmp_path / "sitecustomize.py").write_text(FAIL_ONCE)
    mine = questions.own(tmp_path, sweep={"arms": {"one": [], "other": ["moe.top_k=4"]}})
    given = [*mine, *questions.shipped("mine", text), f"output={tmp_path / 'runs'}", "sweep.retries=1", *JOBLIB]
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    ended = process("train", "-m", *given, cwd=tmp_path, PYTHONPATH=path, FAILED=str(tmp_path / "failed"))
    assert ended.status == 0, ended.out + ended.err
    runs = questions.runs(tmp_path / "runs", "mine")
    assert {arm: questions.status(run) for arm, run in runs.items()} == {"one": "finished", "other": "finished"}
    logs = [run.with_name(run.name + ".log").read_text() for run in runs.values()]
    assert sorted(log.count("failed once") for log in logs) == [0, 1]


BEGIN_AND_DIE = """
import json, os, pathlib, signal, sys
pathlib.Path(json.loads(sys.stdin.readline())["output"]).mkdir()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_run_is_tried_again(
    upcycle: Callable[..., Outcome], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the kernel kills for want of memory prints nothing: the signal is named. What had not begun is removed."""
    monkeypatch.setattr("upcycle.sweep.job.WORKER", (sys.executable, "-c", BEGIN_AND_DIE))
    mine = questions.own(tmp_path, sweep={"arms": {"only": []}})
    ended = upcycle(
        "train", "-m", *mine, *questions.shipped("mine", text), f"output={tmp_path / 'runs'}", "sweep.retries=2"
    )
    assert ended.status == 1
    (run,) = questions.runs(tmp_path / "runs", "mine").values()
    assert run.with_name(run.name + ".log").read_text() == 3 * "killed by SIGKILL\n"
    assert "only, seed 0 (not started)" in ended.out
    assert "  killed by SIGKILL" in ended.out


@pytest.mark.parametrize("full", [False, True])
def test_a_launcher_that_breaks_says_where_it_is_asked(
    full: bool, upcycle: Callable[..., Outcome], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        def launch(self, *_: Any, **__: Any) -> None:
            raise KeyError("a bug")

    monkeypatch.setattr("hydra.core.plugins.Plugins.instantiate_launcher", lambda *_, **__: Broken())
    monkeypatch.setenv("HYDRA_FULL_ERROR", str(int(full)))
    mine = questions.own(tmp_path, sweep={"arms": {"only": []}})
    ended = upcycle("train", "-m", *mine, *questions.shipped("mine", text), f"output={tmp_path / 'runs'}")
    assert ended.status == 1
    assert "the launcher ended early: KeyError: 'a bug'" in ended.err
    assert "1 of 1 runs did not finish" in ended.out
    assert ("in launch" in ended.err) == full
