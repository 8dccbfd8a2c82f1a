"""JSON that a user hands over: whatever is wrong with a file, the error is typed and names the file."""

from __future__ import annotations

import json
import math
import struct
import subprocess
from typing import TYPE_CHECKING

import pytest
from transformers import PreTrainedConfig

from upcycle.checkpoint.index import read_weight_map
from upcycle.checkpoint.lock import CONTROL, recorded
from upcycle.checkpoint.safetensors import read_header
from upcycle.data.cache import BOUNDS, TOKENS, cached_tokens
from upcycle.data.config import SourceConfig
from upcycle.data.sources import open_documents
from upcycle.errors import RecordError, SourceError, UpcycleError
from upcycle.files.json import MAX_DEPTH, NotJsonError, json_text, parse_json, tagged
from upcycle.models.config import read_config
from upcycle.models.load import GENERATION, TOKENIZER, from_pretrained, load_tokenizer_from
from upcycle.models.manifest import MANIFEST, read_manifest
from upcycle.sweep.index import read_index, read_indexes
from upcycle.tracking import wandb_offline
from upcycle.tracking.record import METRICS, RUN, Record, read_run
from upcycle.tracking.rows import RowDecoder

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

DEEP = b"[" * 200_000 + b"]" * 200_000
BAD = {
    "an array, 200,000 deep": (DEEP, f"nested more than {MAX_DEPTH} deep"),
    "an object, 400 deep": (b'{"a":' * 400 + b"1" + b"}" * 400, f"nested more than {MAX_DEPTH} deep"),
    "cut off": (b'{"a"', "Expecting"),
    "nothing": (b"", "Expecting"),
    "not UTF-8": (b'{"a": "\xff"}', "not UTF-8"),
    "a number of 5000 digits": (b"1" * 5000, "4300 digits"),
}


@pytest.fixture(params=BAD.values(), ids=BAD.keys())
def bad(request: pytest.FixtureRequest) -> tuple[bytes, str]:
    """What a file holds, and what is said of it."""
    found: tuple[bytes, str] = request.param
    return found


def test_what_is_no_json(bad: tuple[bytes, str]) -> None:
    with pytest.raises(NotJsonError, match=bad[1]):
        parse_json(bad[0])


def test_the_deepest_that_is_read() -> None:
    text = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert parse_json(text) == json.loads(text)
    with pytest.raises(NotJsonError):
        parse_json(f"[{text}]")


FILES: dict[str, Callable[[Path], object]] = {
    "config.json": lambda file: read_config(file.parent),
    "model.safetensors.index.json": read_weight_map,
    MANIFEST: lambda file: read_manifest(file.parent),
    RUN: lambda file: read_run(file.parent),
    **dict.fromkeys(TOKENIZER, lambda file: load_tokenizer_from(file.parent)),
    **dict.fromkeys(GENERATION, lambda file: from_pretrained(None, file.parent)),
}


@pytest.mark.parametrize("name", FILES)
def test_files(tmp_path: Path, name: str, bad: tuple[bytes, str]) -> None:
    (tmp_path / name).write_bytes(bad[0])
    with pytest.raises(SourceError, match=f"{name} is not JSON\n.*{tmp_path}/{name}: .*{bad[1]}.*\n  remedy"):
        FILES[name](tmp_path / name)


@pytest.mark.parametrize("name", FILES)
def test_files_without_an_object(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("[1]")
    with pytest.raises(SourceError, match=rf"{name} is not a JSON object\n.*{tmp_path}/{name}: \[1\]"):
        FILES[name](tmp_path / name)


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_directories(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(UpcycleError, match=f"cannot read {tmp_path}/{name}"):
        FILES[name](tmp_path / name)


def test_headers(tmp_path: Path, bad: tuple[bytes, str]) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(bad[0])) + bad[0])
    with pytest.raises(SourceError, match=f"{file} is not a valid safetensors file\n.*not JSON: .*{bad[1]}"):
        read_header(file)


def test_rows_of_a_record(bad: tuple[bytes, str]) -> None:
    with pytest.raises(RecordError, match=r"a row of a record is damaged\n.*runs/a, row 2"):
        RowDecoder().decode("runs/a", b'{"step": 1}\n%b\n' % (bad[0] or b"{"))


def test_rows_that_come_again(tmp_path: Path, bad: tuple[bytes, str]) -> None:
    """A run that goes on drops the damaged row."""
    (tmp_path / METRICS).write_bytes(b'{"step": 1, "x": 2}\n%b\n[]' % bad[0])
    record = Record(tmp_path)
    record.forget_after(1)
    assert (tmp_path / METRICS).read_text() == '{"step": 1, "x": 2}\n'
    assert record.last == {"x": 2}


def test_rows_of_text(tmp_path: Path, bad: tuple[bytes, str]) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"text": "a"}\n%b\n' % (bad[0] or b"{"))
    with pytest.raises(SourceError, match=f"{file}"):
        list(open_documents(SourceConfig(name="text", files=str(file))))


def test_the_index_of_a_sweep(tmp_path: Path, bad: tuple[bytes, str]) -> None:
    (tmp_path / "egt.json").write_bytes(bad[0])
    with pytest.raises(RecordError, match=f"index of the sweep is damaged\n.*{tmp_path}/egt.json"):
        read_index(tmp_path, "egt")
    assert read_indexes(tmp_path) == {}


def test_logs_of_wandb(tmp_path: Path, bad: tuple[bytes, str], monkeypatch: pytest.MonkeyPatch) -> None:
    said = subprocess.CompletedProcess([], 0, stdout=bad[0] or b" ", stderr=b"")
    monkeypatch.setattr(wandb_offline.subprocess, "run", lambda *_args, **_kwargs: said)
    with pytest.raises(RecordError, match=f"offline W&B run cannot be read\n.*{tmp_path}/run.wandb: .*{bad[1]}"):
        wandb_offline.inspect(tmp_path / "run.wandb")


def test_what_only_this_library_reads(tmp_path: Path, bad: tuple[bytes, str]) -> None:
    """It is made anew."""
    (tmp_path / CONTROL).write_bytes(bad[0])
    assert recorded(tmp_path) is None

    def build(directory: Path) -> None:
        import numpy as np

        np.save(directory / TOKENS, np.zeros(3, dtype=np.uint16))
        np.save(directory / BOUNDS, np.zeros((1, 2), dtype=np.int64))

    cached_tokens(tmp_path / "cache", "key", build)
    (tmp_path / "cache" / "key" / "header.json").write_bytes(bad[0])
    assert len(cached_tokens(tmp_path / "cache", "key", build).tokens) == 3
    assert set(json.loads((tmp_path / "cache" / "key" / "header.json").read_text())) == {TOKENS, BOUNDS}


def test_what_is_written_is_strict() -> None:
    content = {"a": [1.5, float("nan"), (float("inf"), None)], "b": "NaN", "c": True}
    assert json.loads(json_text(content, indent=1)) == {"a": [1.5, None, [None, None]], "b": "NaN", "c": True}


def test_infinities_are_written_as_transformers_writes_and_reads_them() -> None:
    content = {"limit": (0.0, math.inf), "inner": {"low": -math.inf, "none": math.nan}, "name": "Infinity", "count": 3}
    written = json.loads(json.dumps(tagged(content), allow_nan=False))
    assert written == PreTrainedConfig._encode_special_floats(content)
    read = PreTrainedConfig._decode_special_floats(written)
    assert read["limit"] == [0.0, math.inf]
    assert read["inner"]["low"] == -math.inf
    assert math.isnan(read["inner"]["none"])
