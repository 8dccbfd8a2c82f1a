"""Several processes, and several machines, write the bytes that one process writes."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import pytest
import torch
from conversions import options
from models import build, save

from upcycle import workers
from upcycle.convert import convert

if TYPE_CHECKING:
    from pathlib import Path

    from upcycle.config import ConvertConfig

SMALL = "20KB"


def hashes(directory: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in directory.iterdir()}


def converted(config: ConvertConfig) -> Path | None:
    return convert(config, on_plan=lambda _conversion, _bytes: lambda _count: None)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save(build("llama"), tmp_path / "llama", max_shard_size=SMALL, dtype=torch.bfloat16)


@pytest.mark.parametrize("init", ["virtual_group", "drop", "noise", "random"])
@pytest.mark.parametrize("target", ["auto", "upcycled_moe"])
def test_processes_write_the_same_bytes(init: str, target: str, source: Path, tmp_path: Path) -> None:
    given = {"init": init, "target": target, "max_shard_size": SMALL, "shared_experts": 1}
    one = converted(options(source, tmp_path / "one", **given))
    two = converted(options(source, tmp_path / "two", workers=2, **given))
    assert one
    assert two
    assert len(list(one.glob("*.safetensors"))) > 2
    assert hashes(one) == hashes(two)


def test_parts_write_the_same_bytes(source: Path, tmp_path: Path) -> None:
    one = converted(options(source, tmp_path / "one", max_shard_size=SMALL))
    parts = [options(source, tmp_path / "parts", max_shard_size=SMALL, part=f"{n}/3") for n in (2, 3, 1)]
    assert converted(parts[0]) is None
    assert converted(parts[1]) is None
    assert not (tmp_path / "parts").exists()
    whole = converted(parts[2])
    assert one
    assert whole
    assert hashes(one) == hashes(whole)


def test_a_seed_of_the_worker_is_rejected(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one process, to which the mutant is known: what it writes is not what the seed asks for."""
    given = {"init": "noise", "max_shard_size": SMALL}
    one = converted(options(source, tmp_path / "one", **given))
    original = workers.Materialiser
    monkeypatch.setattr(workers, "Materialiser", lambda read, seed: original(read, seed + 1))
    other = converted(options(source, tmp_path / "other", **given))
    assert one
    assert other
    assert hashes(one) != hashes(other)
