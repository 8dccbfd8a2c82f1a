"""Conversions that are killed, interrupted or fail: the output's name never holds half of one, and work resumes."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from cli import SHARD, SMALL, contents, edit_tensor
from slowly import Run, weight_bytes

from upcycle.convert.materialise import Materialiser
from upcycle.files import durable as file_operations

if TYPE_CHECKING:
    from collections.abc import Iterator

pytest_plugins = ["tiny"]


@pytest.mark.slow
def test_killed_again_and_again(upcycle, tiny_llama, tmp_path, whole):
    """SIGKILL at random byte counts, each time resuming what the last one left."""
    output, staging, total = tmp_path / "output", tmp_path / ".output.partial", weight_bytes(whole)
    arguments = (f"source={tiny_llama}", f"output={output}", *SMALL, SHARD, "resume=true")
    finished = set()
    for count in sorted(random.Random(0).sample(range(total), 3)):
        with Run(*arguments, cwd=tmp_path, stop_at=count) as run:
            run.wait_until_stopped(staging)
            assert run.end(signal.SIGKILL).status == -signal.SIGKILL
        assert not output.exists()
        kept = {file.name: file.stat().st_mtime_ns for file in staging.glob("*.safetensors")}
        assert finished <= kept.items(), "a resumed run wrote a finished file again"
        finished = set(kept.items())
    assert finished
    outcome = upcycle("convert", *arguments)
    assert outcome.status == 0, outcome.err
    assert contents(output) == contents(whole)
    assert finished <= {(file.name, file.stat().st_mtime_ns) for file in output.iterdir()}
    assert not staging.exists()


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_ctrl_c(upcycle, tiny_llama, tmp_path, whole, share):
    """Exit status 130 and no traceback; what is complete is kept, and otherwise nothing is."""
    output, staging = tmp_path / "output", tmp_path / ".output.partial"
    arguments = (f"source={tiny_llama}", f"output={output}", *SMALL, SHARD)
    with Run(*arguments, cwd=tmp_path, stop_at=int(share * weight_bytes(whole)) + 1) as run:
        run.wait_until_stopped(staging)
        outcome = run.end(signal.SIGINT)
    assert outcome.status == 130
    assert "Traceback" not in outcome.err
    assert outcome.err.endswith("upcycle: interrupted\n")
    assert not output.exists()
    assert staging.exists() is bool(share)
    assert ("continue with resume=true" in outcome.err) is bool(share)
    if share:
        upcycle("convert", *arguments).refused("an interrupted run left", remedy="resume=true")
    assert upcycle("convert", *arguments, "resume=true").status == 0
    assert contents(output) == contents(whole)


@pytest.fixture
def listening() -> Iterator[None]:
    """This process takes SIGINT, although the shell that put the tests into the background had it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("becomes", ["an error", "nothing"])
def test_ctrl_c_inside_c_code(upcycle, tiny_llama, tmp_path, monkeypatch, listening, becomes):
    """torch turns a KeyboardInterrupt that meets its C code into a ValueError; other code may swallow it."""
    blocks = Materialiser.blocks

    def interrupted(self, target, dtype):
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        if becomes == "an error":
            raise ValueError("could not determine the shape of object type 'torch.storage.UntypedStorage'")
        return blocks(self, target, dtype)

    monkeypatch.setattr(Materialiser, "blocks", interrupted)
    outcome = upcycle("convert", f"source={tiny_llama}", f"output={tmp_path / 'output'}", *SMALL)
    assert outcome.status == 130
    assert outcome.err.endswith("upcycle: interrupted\n")
    assert {path.name for path in tmp_path.iterdir()} == {"work"}


def test_resume_with_another_request(upcycle, tiny_llama, source, tmp_path, whole):
    """A staging directory of another source, seed or layout is not continued, and not touched."""
    staging = tmp_path / ".output.partial"
    first = (f"source={tiny_llama}", f"output={tmp_path / 'output'}", *SMALL, SHARD)
    edit_tensor(source, "model.layers.2.mlp.up_proj.weight", lambda t: t * 2)
    fill_up(upcycle, first)
    before = contents(staging)
    assert before
    for change in (
        f"source={source}",
        "seed=1",
        "max_shard_size=3KB",
        "moe.router_order=topk_softmax",
        "dtype=float32",
    ):
        outcome = upcycle("convert", *first, change, "resume=true")
        outcome.refused("with other settings or another source", found="fingerprint", remedy="overwrite=true")
        assert contents(staging) == before
    assert upcycle("convert", *first, "resume=true").status == 0
    assert contents(tmp_path / "output") == contents(whole)


def fill_up(upcycle, arguments) -> None:
    """Convert onto a disk that is full after 20,000 bytes."""
    left, write = 20_000, os.write

    def limited(descriptor: int, data: bytes) -> int:
        nonlocal left
        left -= len(data)
        if left < 0:
            raise OSError(28, "No space left on device")
        return write(descriptor, data)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(file_operations.os, "write", limited)
        upcycle("convert", *arguments).refused("cannot write", found="No space left on device")


def test_resume_with_nothing_to_resume(upcycle, tiny_llama, tmp_path, whole):
    output = tmp_path / "output"
    outcome = upcycle("convert", f"source={tiny_llama}", f"output={output}", *SMALL, SHARD, "resume=true")
    assert outcome.status == 0
    assert "nothing to resume" in outcome.err
    assert contents(output) == contents(whole)


# Replacing an output.


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """An earlier output."""
    output = tmp_path / "output"
    output.mkdir()
    (output / "config.json").write_text("{}")
    (output / "model.safetensors").write_text("old")
    return output


def test_overwrite(upcycle, tiny_llama, tmp_path, old, whole):
    assert upcycle("convert", f"source={tiny_llama}", f"output={old}", *SMALL, SHARD, "overwrite=true").status == 0
    assert contents(old) == contents(whole)
    assert {path.name for path in tmp_path.iterdir()} == {"output", "work"}


def test_a_failed_overwrite_keeps_the_old_output(upcycle, source, tmp_path, old):
    """Whether the request, the source or the disk is at fault."""
    before = contents(old)
    arguments = (f"source={source}", f"output={old}", *SMALL, SHARD, "overwrite=true")
    upcycle("convert", *arguments, "moe.top_k=3").refused("virtual groups")
    assert contents(old) == before
    fill_up(upcycle, arguments)
    assert contents(old) == before
    edit_tensor(source, "model.layers.2.mlp.up_proj.weight", lambda t: t * torch.nan)
    upcycle("convert", *arguments).refused("NaN or infinity")
    assert contents(old) == before
    assert {path.name for path in tmp_path.iterdir()} == {"output", "work", "source"}


@pytest.mark.slow
def test_an_overwrite_that_is_killed_keeps_the_old_output(upcycle, tiny_llama, tmp_path, old, whole):
    before = contents(old)
    arguments = (f"source={tiny_llama}", f"output={old}", *SMALL, SHARD, "overwrite=true")
    with Run(*arguments, cwd=tmp_path, stop_at=weight_bytes(whole) // 2) as run:
        run.wait_until_stopped(tmp_path / ".output.partial")
        assert run.end(signal.SIGKILL).status == -signal.SIGKILL
    assert contents(old) == before
    assert upcycle("convert", *arguments, "resume=true").status == 0
    assert contents(old) == contents(whole)
    assert {path.name for path in tmp_path.iterdir()} == {"output", "work"}


@pytest.mark.parametrize("rename", [1, 2])
def test_an_overwrite_whose_renaming_fails_keeps_the_old_output(
    upcycle, tiny_llama, tmp_path, old, whole, monkeypatch, rename
):
    """The old output is moved aside (first renaming) and must be put back if the new one cannot take its place."""
    before, original, left = contents(old), Path.rename, rename

    def rename_or_fail(path: Path, target: Path) -> Path:
        nonlocal left
        if "output" in (path.name, Path(target).name):
            left -= 1
            if left == 0:
                raise PermissionError(1, "Operation not permitted")
        return original(path, target)

    arguments = (f"source={tiny_llama}", f"output={old}", *SMALL, SHARD, "overwrite=true")
    with monkeypatch.context() as failing:
        failing.setattr(Path, "rename", rename_or_fail)
        upcycle("convert", *arguments).refused("cannot write", found="Operation not permitted")
    assert contents(old) == before
    assert upcycle("convert", *arguments, "resume=true").status == 0
    assert contents(old) == contents(whole)
    assert {path.name for path in tmp_path.iterdir()} == {"output", "work"}
