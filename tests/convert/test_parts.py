"""`part=I/N`: what is refused, what is left of a part that ended early, and several at once."""

from __future__ import annotations

import signal
import subprocess
from contextlib import ExitStack

import pytest
from cli import SHARD, SMALL, command, contents, edit_tensor
from ended import Ended
from slowly import Run, weight_bytes

pytest_plugins = ["tiny"]


@pytest.fixture
def arguments(tiny_llama, tmp_path) -> tuple[str, ...]:
    return (f"source={tiny_llama}", f"output={tmp_path / 'output'}", *SMALL, SHARD)


@pytest.mark.parametrize("part", ["0/2", "3/2", "2", "1/0", "-1/2", "a/b", "1/2/3"])
def test_what_is_no_part(upcycle, arguments, tmp_path, part):
    upcycle("convert", *arguments, f"part='{part}'").refused("part is not a part", found=part)
    assert {path.name for path in tmp_path.iterdir()} == {"work"}


def test_overwrite(upcycle, arguments, tmp_path):
    outcome = upcycle("convert", *arguments, "part=1/2", "overwrite=true")
    outcome.refused("overwrite=true is for a conversion that one command makes", found="part=1/2")
    assert {path.name for path in tmp_path.iterdir()} == {"work"}


@pytest.mark.parametrize("other", ["seed=1", "max_shard_size=3KB", "another source"])
def test_another_conversion(upcycle, arguments, source, tmp_path, other):
    """It is told, and what the first part wrote stays."""
    assert upcycle("convert", *arguments, "part=1/2").status == 0
    before = contents(tmp_path / ".output.partial")
    if other == "another source":
        edit_tensor(source, "model.layers.2.mlp.up_proj.weight", lambda t: t * 2)
        other = f"source={source}"
    outcome = upcycle("convert", *arguments, "part=2/2", other)
    outcome.refused("with other settings or another source", found="fingerprint")
    assert contents(tmp_path / ".output.partial") == before | {".upcycle-part-2-of-2.lock": b""}


def test_another_number_of_parts(upcycle, arguments, tmp_path, whole):
    """Who writes what is not what the output is: the files that are missing are those of either division."""
    assert upcycle("convert", *arguments, "part=1/2").status == 0
    outcome = upcycle("convert", *arguments, "part=3/3")
    assert outcome.status == 0
    assert "these are not: part=2/3" in outcome.err
    assert upcycle("convert", *arguments, "part=2/2").status == 0
    assert contents(tmp_path / "output") == contents(whole)


def test_more_parts_than_files(upcycle, tiny_llama, tmp_path):
    """Some write nothing, and may be the last."""
    arguments = (f"source={tiny_llama}", f"output={tmp_path / 'output'}", *SMALL)
    for number in (2, 1, 3):
        assert not (tmp_path / "output").exists()
        assert upcycle("convert", *arguments, f"part={number}/3").status == 0
    assert len(list((tmp_path / "output").glob("*.safetensors"))) == 1


def test_a_part_beside_a_conversion_of_its_own(upcycle, arguments, tmp_path, whole):
    """A plain `convert` does not take over what parts have begun, unless told."""
    assert upcycle("convert", *arguments, "part=1/2").status == 0
    upcycle("convert", *arguments).refused("an interrupted run left", remedy="resume=true")
    assert upcycle("convert", *arguments, "resume=true").status == 0
    assert contents(tmp_path / "output") == contents(whole)


@pytest.mark.slow
def test_a_killed_part_is_started_again(upcycle, arguments, tmp_path, whole):
    staging = tmp_path / ".output.partial"
    with Run(*arguments, "part=1/2", cwd=tmp_path, stop_at=weight_bytes(whole) // 4) as run:
        run.wait_until_stopped(staging)
        upcycle("convert", *arguments, "part=1/2").refused("another process")
        assert run.end(signal.SIGKILL).status == -signal.SIGKILL
    kept = {(file.name, file.stat().st_mtime_ns) for file in staging.glob("*.safetensors")}
    assert kept
    assert upcycle("convert", *arguments, "part=2/2").status == 0
    assert not (tmp_path / "output").exists()
    assert upcycle("convert", *arguments, "part=1/2").status == 0
    assert contents(tmp_path / "output") == contents(whole)
    assert kept <= {(file.name, file.stat().st_mtime_ns) for file in (tmp_path / "output").iterdir()}


@pytest.mark.slow
def test_all_parts_at_once(arguments, tmp_path, whole):
    lines = [command("convert", *arguments, f"part={number}/3") for number in (1, 2, 3)]
    with ExitStack() as ending:
        running = [ending.enter_context(Ended(line, cwd=tmp_path, stderr=subprocess.PIPE, text=True)) for line in lines]
        errors = [process.communicate(timeout=120)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], errors
    assert contents(tmp_path / "output") == contents(whole)
    assert {path.name for path in tmp_path.iterdir()} == {"output"}
