"""Conversions with workers that are killed, interrupted or fail: they end as those of one process do, all of them."""

from __future__ import annotations

import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import psutil
import pytest
from cli import SHARD, SMALL, contents, edit_tensor
from slowly import Run, weight_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytest_plugins = ["tiny"]

SECONDS_TO_END = 30
LIMITED = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (1500, resource.RLIM_INFINITY))
from upcycle.cli import main
main()
"""


@pytest.fixture
def arguments(tiny_llama: Path, tmp_path: Path) -> tuple[str, ...]:
    return (f"source={tiny_llama}", f"output={tmp_path / 'output'}", *SMALL, SHARD)


@pytest.fixture
def half_way(arguments, tmp_path, whole) -> Iterator[Run]:
    """A conversion with two workers in the middle of its writing."""
    with Run(*arguments, "workers=2", cwd=tmp_path, stop_at=weight_bytes(whole) // 2) as run:
        run.wait_until_stopped(tmp_path / ".output.partial")
        yield run


def assert_ended(workers: list[psutil.Process]) -> None:
    assert len(workers) == 2
    assert not psutil.wait_procs(workers, timeout=SECONDS_TO_END)[1], "a worker outlived its parent"


@pytest.fixture
def resumed(upcycle, arguments, tmp_path, whole):
    """Continues with two workers, and compares."""

    def run() -> None:
        output, staging = tmp_path / "output", tmp_path / ".output.partial"
        assert not output.exists()
        kept = {(file.name, file.stat().st_mtime_ns) for file in staging.glob("*.safetensors")}
        assert kept
        outcome = upcycle("convert", *arguments, "workers=2", "resume=true")
        assert outcome.status == 0, outcome.err
        assert contents(output) == contents(whole)
        assert kept <= {(file.name, file.stat().st_mtime_ns) for file in output.iterdir()}
        assert not staging.exists()

    return run


@pytest.mark.slow
def test_a_worker_is_killed(half_way, resumed):
    workers = half_way.workers()
    workers[0].kill()
    outcome = half_way.ended()
    outcome.refused("a process that wrote files ended", found="killed by SIGKILL", remedy="fewer workers")
    assert "continue with resume=true" in outcome.err
    assert_ended(workers)
    resumed()


@pytest.mark.slow
def test_all_is_killed_but_the_workers(half_way, resumed):
    workers = half_way.workers()
    assert half_way.end(signal.SIGKILL).status == -signal.SIGKILL
    assert_ended(workers)
    resumed()


@pytest.mark.slow
@pytest.mark.parametrize("to_all", [True, False], ids=["terminal", "one process"])
def test_ctrl_c(half_way, resumed, to_all):
    """A terminal sends it to the workers too."""
    workers = half_way.workers()
    outcome = half_way.end(signal.SIGINT, to_all=to_all)
    assert outcome.status == 130
    assert "Traceback" not in outcome.err
    assert outcome.err.endswith("upcycle: interrupted\n")
    assert_ended(workers)
    resumed()


@pytest.mark.slow
def test_ctrl_c_while_workers_start(arguments, tmp_path):
    """Before they have anything to say, and before any of their own code runs."""
    with Run(*arguments, "workers=2", cwd=tmp_path, stop_at=1) as run:
        while not (workers := run.workers()):
            assert run.process.poll() is None
        outcome = run.end(signal.SIGINT, to_all=True)
    assert outcome.status == 130
    assert "Traceback" not in outcome.err
    assert not psutil.wait_procs(workers, timeout=SECONDS_TO_END)[1]
    assert not (tmp_path / ".output.partial").exists()


@pytest.mark.slow
def test_the_disk_of_a_worker_is_full(arguments, tmp_path):
    """The same message as from one process, but for the file that is met first."""
    messages = []
    for workers in (1, 2):
        line = [sys.executable, "-c", LIMITED, "convert", *arguments, f"workers={workers}", "overwrite=true"]
        ended = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert ended.returncode == 1
        assert "Traceback" not in ended.stderr
        messages.append(ended.stderr[ended.stderr.rindex("upcycle: cannot write") :].splitlines())
        assert not (tmp_path / "output").exists()
    assert messages[0][1:] == messages[1][1:] == ["  found:    File too large"]


def test_the_source_of_a_worker_is_bad(upcycle, source, tmp_path):
    def spoil(tensor):
        tensor[3, 5] = float("nan")
        return tensor

    edit_tensor(source, "model.layers.1.mlp.gate_proj.weight", spoil)
    outcome = upcycle("convert", f"source={source}", f"output={tmp_path / 'output'}", *SMALL, SHARD, "workers=2")
    outcome.refused("NaN or infinity in model.layers.1", found="1 of 384 values", remedy="repair the checkpoint")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "work"}
