"""A run killed at any byte leaves no incomplete output, and its resumption ends with the very same files."""

from __future__ import annotations

import os
import random
import signal

import pytest
import torch

from upcycle.checkpoint import Staging, TensorSpec, index_json, layout_shards
from upcycle.checkpoint import staged as staged_module
from upcycle.checkpoint.lock import CONTROL

# From Python 3.12 on, forking warns wherever torch has started threads; the children here use none of them.
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")

TENSORS = {f"layer.{i}": torch.arange(i * 10, i * 10 + 50 + i, dtype=torch.float32) for i in range(6)}
SHARDS = layout_shards([TensorSpec(name=n, dtype="F32", shape=tuple(t.shape)) for n, t in TENSORS.items()], 500)
TOTAL = sum(shard.nbytes for shard in SHARDS)
PIECE = 24


def convert(output, on_bytes, before_commit=lambda: None):
    with Staging.open(output, fingerprint="f", overwrite=False, resume=True) as staging:
        for shard in SHARDS:
            if not staging.has(shard):
                staging.write_shard(shard, lambda spec: TENSORS[spec.name].split(20), on_bytes)
        staging.write_text("model.safetensors.index.json", index_json(SHARDS))
        staging.write_text("config.json", "{}")
        before_commit()
        staging.commit()


def in_a_child(work):
    """Run `work` in a forked process; return the signal that ended it, or 0."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(1)
    return os.WTERMSIG(os.waitpid(pid, 0)[1])


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def killed_after(output, limit):
    seen = 0

    def on_bytes(count):
        nonlocal seen
        seen += count
        if seen >= limit:
            die()

    return in_a_child(lambda: convert(output, on_bytes))


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def whole(tmp_path, monkeypatch):
    monkeypatch.setattr(staged_module, "PIECE_BYTES", PIECE)
    convert(tmp_path / "whole", lambda _: None)
    return contents(tmp_path / "whole")


def test_killed_anywhere_then_resumed(tmp_path, whole):
    limits = [1, TOTAL, *random.Random(0).sample(range(2, TOTAL), 10)]
    for limit in limits:
        output = tmp_path / f"out{limit}"
        assert killed_after(output, limit) == signal.SIGKILL
        assert not output.exists()
        written = []
        convert(output, written.append)
        assert contents(output) == whole
        assert sum(written) <= TOTAL - (limit // PIECE * PIECE) + max(shard.nbytes for shard in SHARDS)


def test_killed_again_and_again(tmp_path, whole):
    output = tmp_path / "out"
    for _ in range(len(SHARDS)):
        assert killed_after(output, SHARDS[0].nbytes + PIECE) in (0, signal.SIGKILL)
        if output.exists():
            break
    else:
        convert(output, lambda _: None)
    assert contents(output) == whole


def test_killed_just_before_the_commit(tmp_path, whole):
    output = tmp_path / "out"
    assert in_a_child(lambda: convert(output, lambda _: None, before_commit=die)) == signal.SIGKILL
    assert not output.exists()
    written = []
    convert(output, written.append)
    assert written == []
    assert contents(output) == whole


@pytest.mark.parametrize("call", range(1, 4))
def test_killed_inside_the_commit(tmp_path, whole, call, monkeypatch):
    """Dies before the commit's n-th change: the move of the old output, the final rename, the record's removal."""
    output = tmp_path / "out"
    output.mkdir()
    (output / "config.json").write_text("old")

    def replace(hook):
        with Staging.open(output, fingerprint="f", overwrite=True, resume=True) as staging:
            for shard in SHARDS:
                if not staging.has(shard):
                    staging.write_shard(shard, lambda spec: [TENSORS[spec.name]], lambda _: None)
            staging.write_text("model.safetensors.index.json", index_json(SHARDS))
            staging.write_text("config.json", "{}")
            hook()
            staging.commit()

    def arm():
        left = call
        path_type = type(output)

        def counted(method):
            def run(*args, **kwargs):
                nonlocal left
                left -= 1
                if left == 0:
                    die()
                return method(*args, **kwargs)

            return run

        for name in ("rename", "unlink"):
            monkeypatch.setattr(path_type, name, counted(getattr(path_type, name)))

    assert in_a_child(lambda: replace(arm)) == signal.SIGKILL
    if output.exists():
        kept = {name: content for name, content in contents(output).items() if name != CONTROL}
        assert kept == ({"config.json": b"old"} if call == 1 else whole)
    replace(lambda: None)
    assert contents(output) == whole
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "out"}
