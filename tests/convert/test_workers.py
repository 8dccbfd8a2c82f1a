"""Several processes, and several machines, write the bytes that one process writes."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import pytest
import torch
from conversions import options
from gguf import GGMLQuantizationType as Kind
from gguf_files import write_gguf
from models import build, save, tokenizer
from safetensors.torch import load_file

from upcycle.convert import prepare, workers
from upcycle.convert.run import convert
from upcycle.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from upcycle.options.config import ConvertConfig

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


def pickled(directory: Path) -> Path:
    """A checkpoint whose weights are a .bin file."""
    save(build("llama"), directory, dtype=torch.bfloat16)
    weights = directory / "model.safetensors"
    torch.save(load_file(weights), directory / "pytorch_model.bin")
    weights.unlink()
    return directory


def quantised(directory: Path) -> Path:
    directory.mkdir()
    return write_gguf(directory / "tiny.gguf", [Kind.Q8_0, Kind.F16])


@pytest.mark.parametrize("made", [pickled, quantised])
def test_processes_read_what_is_not_safetensors(made: Callable[[Path], Path], tmp_path: Path) -> None:
    """Each opens the source itself, and widens what it reads to float32."""
    source = made(tmp_path / "dense")
    given = {"max_shard_size": "40KB", "dtype": "float32"}
    one = converted(options(source, tmp_path / "one", **given))
    two = converted(options(source, tmp_path / "two", workers=2, **given))
    assert one
    assert two
    files = list(two.glob("*.safetensors"))
    assert len(files) > 2
    assert {tensor.dtype for file in files for tensor in load_file(file).values()} == {torch.float32}
    assert hashes(one) == hashes(two)


CALIBRATED = {"scaling": "calibrated", "router_std": 0.2, "max_shard_size": SMALL}


@pytest.fixture
def speaking(source: Path) -> Path:
    """The source with a tokenizer, for what measures on text."""
    tokenizer().save_pretrained(source)
    return source


def test_every_part_calibrates_anew(speaking: Path, tmp_path: Path) -> None:
    """And finds the same factors, to the last bit."""
    one = converted(options(speaking, tmp_path / "one", **CALIBRATED))
    assert converted(options(speaking, tmp_path / "parts", part="1/2", **CALIBRATED)) is None
    whole = converted(options(speaking, tmp_path / "parts", part="2/2", **CALIBRATED))
    assert one
    assert whole
    assert hashes(one) == hashes(whole)


def test_parts_that_measured_otherwise_do_not_mix(
    speaking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert converted(options(speaking, tmp_path / "parts", part="1/2", **CALIBRATED)) is None
    measured = prepare.measured_masses

    def elsewhere(*given: Any, **named: Any) -> dict[int, float]:
        return {layer: mass * (1 + 2**-40) for layer, mass in measured(*given, **named).items()}

    monkeypatch.setattr(prepare, "measured_masses", elsewhere)
    with pytest.raises(OutputError, match=r"with other settings or another source(.|\n)*plan"):
        converted(options(speaking, tmp_path / "parts", part="2/2", **CALIBRATED))


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
    monkeypatch.setattr(workers, "Materialiser", lambda read, seed, *bases: original(read, seed + 1, *bases))
    other = converted(options(source, tmp_path / "other", **given))
    assert one
    assert other
    assert hashes(one) != hashes(other)
