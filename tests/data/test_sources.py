"""Documents of every kind of source."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
import sysconfig
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import pyarrow
import pytest
from datasets import Dataset

from upcycle.data.config import DataConfig, DomainConfig
from upcycle.data.sources import open_documents, standard_library
from upcycle.errors import ConfigError, SourceError

if TYPE_CHECKING:
    from collections.abc import Iterator

TEXTS = ["first", "second é", "third\r\n"]


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def read(name: str, **fields: Any) -> list[str]:
    return list(open_documents(DataConfig(name=name, **fields)))


def rows(directory: Path, suffix: str) -> Path:
    """The texts with an empty one among them, in a file of rows."""
    file = directory / f"rows.{suffix}"
    table = [{"body": text} for text in [*TEXTS, ""]]
    if suffix == "jsonl":
        file.write_text("\n".join(map(json.dumps, table)) + "\n\n")
    else:
        Dataset.from_list(table).to_parquet(file)
    return file


def test_the_standard_library() -> None:
    root = Path(sysconfig.get_path("stdlib"))
    files = [file.relative_to(root).as_posix() for file in standard_library()]
    assert files == sorted(files)
    assert {"argparse.py", "json/decoder.py", "asyncio/events.py"} <= set(files)
    assert not [name for name in files if "test" in Path(name).parts[:-1] or "site-packages" in name]
    size = sum((root / name).stat().st_size for name in files)
    assert 8e6 < size < 20e6  # 12.1 MB in 3.11.7


def test_the_standard_library_is_read_by_path() -> None:
    documents = read("python_stdlib")
    assert documents[0] == (standard_library()[0]).read_bytes().decode()
    assert len(documents) > 500
    assert all(documents)  # some __init__.py are empty


def test_files_and_globs(tmp_path: Path) -> None:
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    for file, text in zip((tmp_path / "z[1].txt", inner / "x.txt", inner / "y.md"), TEXTS, strict=True):
        file.write_bytes(text.encode())
    assert read("text", files=f"{tmp_path}/**/*.txt") == ["second é", "first"]
    assert read("text", files=[f"{inner}/y.md", f"{tmp_path}/z[1].txt", f"{inner}/*.md"]) == ["third\r\n", "first"]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_rows(tmp_path: Path, suffix: str) -> None:
    documents = open_documents(DataConfig(name="text", files=str(rows(tmp_path, suffix)), field="body"))
    assert list(documents) == TEXTS
    assert list(documents) == TEXTS, "they can be read twice"


CSV = 'id,body\n1,first\n2,"second ""é"","\n3,"third\r\n"\n4,\n'
LINES = "".join(f"{json.dumps({'body': text})}\n" for text in TEXTS)
OF_ROWS = {
    "rows.JSONL": LINES.encode(),
    "rows.ndjson": LINES.encode(),
    "mark.jsonl": LINES.encode("utf-8-sig"),
    "array.json": json.dumps([{"body": text} for text in TEXTS], indent=1).encode("utf-8-sig"),
    "texts.json": json.dumps(TEXTS).encode(),
    "lines.json": LINES.encode("utf-8-sig"),
    "rows.csv": CSV.replace('second ""é"",', "second é").encode("utf-8-sig"),
    "rows.Tsv": CSV.replace('second ""é"",', "second é").replace(",", "\t").encode(),
}


@pytest.mark.parametrize("name", OF_ROWS)
def test_rows_of_every_kind(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(OF_ROWS[name])
    documents = open_documents(DataConfig(name="text", files=str(tmp_path / name), field="body"))
    assert list(documents) == TEXTS
    assert list(documents) == TEXTS, "they can be read twice"


def test_values_of_csv_are_text(tmp_path: Path) -> None:
    """Neither numbers nor empty, whatever they look like."""
    (tmp_path / "rows.csv").write_text('id,body\nx,007\n1,NA\n2,null\n3,true\n4,"a ""b"",\nc"\n')
    assert read("text", files=f"{tmp_path}/*.csv", field="body") == ["007", "NA", "null", "true", 'a "b",\nc']


COMPRESS = {
    "gz": gzip.compress,
    "BZ2": bz2.compress,
    "xz": lzma.compress,
    "zst": partial(pyarrow.compress, codec="zstd", asbytes=True),
}


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed(tmp_path: Path, suffix: str) -> None:
    parquet = rows(tmp_path, "parquet").read_bytes()
    plain = {**OF_ROWS, "rows.parquet": parquet}
    for name in ("rows.JSONL", "array.json", "rows.csv", "rows.parquet"):
        (tmp_path / f"{name}.{suffix}").write_bytes(COMPRESS[suffix](plain[name]))
        assert read("text", files=f"{tmp_path}/{name}.{suffix}", field="body") == TEXTS
    (tmp_path / f"text.txt.{suffix}").write_bytes(COMPRESS[suffix](b"a text"))
    assert read("text", files=f"{tmp_path}/*.txt.{suffix}") == ["a text"]
    for damaged in (b"a text", COMPRESS[suffix](random.Random(0).randbytes(99_999))[:-20]):
        (tmp_path / f"text.txt.{suffix}").write_bytes(damaged)
        with pytest.raises(SourceError, match=f"cannot be decompressed\n  found: +{tmp_path}/text.txt.{suffix}"):
            read("text", files=f"{tmp_path}/*.txt.{suffix}")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '{"body": 1', r"the file is not JSON\n.*a.json: .*\n.*an array of objects or strings, or one obj"),
        ("a.json", '{"model": "x"}', r"no field text\n.*a.json, row 1: model\n"),
        ("a.json", '["x", {"body": "y"}]', r"no field text\n.*a.json, row 2: body\n"),
        ("a.json", '{"text": "x"}\n{"text"', r"a line is not JSON\n.*a.json:2"),
        ("a.csv", "id,body\n1,x\n", r"no field text\n.*a.csv: id, body"),
        ("a.csv", "id,text\n1\n", r"the file is not csv with a line of names\n.*a.csv: .*Expected 2 columns, got 1"),
        ("a.csv", "text,text\n1,2\n", r"several columns are named text\n.*a.csv"),
        ("a.tsv", "", r"the file is not tsv with a line of names\n.*a.tsv: Empty"),
    ],
)
def test_what_is_not_rows(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(SourceError, match=message):
        read("text", files=str(tmp_path / name))


def test_rows_under_a_suffix_of_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They are said by name; a text with braces in it is not."""
    rows_of_json = {"a.txt": LINES, "b": json.dumps([{"body": "x"}], indent=1), "c.md": f"\ufeff\n{LINES}"}
    others = {
        "d.txt": '{"a": 1}\n}',
        "e.py": "{\n}",
        "f.txt": "[1, 2]",
        "g.txt": "",
        "h.txt": '["x"]',
        "i.txt": "{" * 999,
    }
    for name, text in (rows_of_json | others).items():
        (tmp_path / name).write_text(text)
    with caplog.at_level("WARNING", "upcycle"):
        assert len(read("text", files=f"{tmp_path}/*")) == 8
    (warning,) = caplog.messages
    assert warning.startswith(f"rows of JSON, taken as one document each, braces and all: {tmp_path}/a.txt, ")
    assert all(f"{tmp_path}/{name}" in warning for name in rows_of_json)
    assert not any(f"{tmp_path}/{name}" in warning for name in others)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_directory_through_datasets(tmp_path: Path, suffix: str, streaming: bool) -> None:
    rows(tmp_path, suffix)
    read_back = read("hf", path=str(tmp_path), field="body", streaming=streaming, max_documents=2)
    assert read_back == TEXTS[:2]


def test_a_saved_dataset(tmp_path: Path) -> None:
    saved = Dataset.from_list([{"text": text} for text in TEXTS])
    saved.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": saved, "other": saved.select([1])}).save_to_disk(tmp_path / "splits")
    assert read("hf", path=str(tmp_path / "one")) == TEXTS
    assert read("hf", path=str(tmp_path / "splits"), split="other") == TEXTS[1:2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"body": "x"}', "a document has no field text"),
        ('{"text": "x"}\n[1]', r"a document has no field text\n.*rows.jsonl:2"),
        ('{"text": 3}', r"the field text is not text\n.*rows.jsonl:1: int"),
        ('{"text": "x"}\n{"text"', r"a line is not JSON\n.*rows.jsonl:2"),
        ('{"text": "\\ud800"}', r"cannot be written as UTF-8\n.*rows.jsonl:1"),
    ],
)
def test_bad_rows(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(SourceError, match=message):
        read("text", files=str(tmp_path / "rows.jsonl"))


def test_bad_files(tmp_path: Path) -> None:
    latin = tmp_path / "latin.txt"
    latin.write_bytes("é".encode("latin-1"))
    with pytest.raises(SourceError, match=f"not UTF-8\n  found: +{latin}"):
        read("text", files=str(latin))
    (tmp_path / "latin.jsonl").write_bytes('{"text": "é"}'.encode("latin-1"))
    with pytest.raises(SourceError, match=r"not UTF-8\n  found: +.*latin.jsonl"):
        read("text", files=f"{tmp_path}/*.jsonl")
    (tmp_path / "no.parquet").write_text("text")
    with pytest.raises(SourceError, match="not parquet"):
        read("text", files=f"{tmp_path}/*.parquet")
    with pytest.raises(SourceError, match=r"no field text\n.*rows.parquet: body"):
        read("text", files=str(rows(tmp_path, "parquet")))


def test_an_unreadable_file(tmp_path: Path) -> None:
    vanishing = tmp_path / "a.txt"
    vanishing.write_text("text")
    documents = open_documents(DataConfig(name="text", files=str(vanishing)))
    vanishing.unlink()
    with pytest.raises(SourceError, match=f"cannot be read\n  found: +{vanishing}"):
        list(documents)


def test_no_file_matches(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no file matches") as refusal:
        read("text", files=[f"{tmp_path}/*.txt"])
    assert "*.txt" in str(refusal.value)
    with pytest.raises(ConfigError, match=r"no file matches\n(.*\n)+.*remedy: +give .*/\*\* for"):
        read("text", files=str(tmp_path))
    with pytest.raises(ConfigError, match="text needs files"):
        read("text")


@pytest.mark.parametrize("path", ["nobody/has-this", "/nowhere/at/all"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_that_cannot_be_had(path: str, streaming: bool) -> None:
    with pytest.raises(SourceError, match=f"cannot be loaded\n  found: +{path}.*\n  remedy: .*local directory"):
        read("hf", path=path, streaming=streaming, max_documents=1)


def test_bad_options_of_datasets(tmp_path: Path) -> None:
    rows(tmp_path, "jsonl")
    with pytest.raises(SourceError, match="no field text"):
        read("hf", path=str(tmp_path))
    with pytest.raises(SourceError, match=r"cannot be loaded(.*\n)+.*split dev"):
        read("hf", path=str(tmp_path), split="dev")
    with pytest.raises(ConfigError, match="streaming has no end"):
        read("hf", path=str(tmp_path), streaming=True)
    with pytest.raises(ConfigError, match="max_documents is not positive"):
        read("hf", path=str(tmp_path), max_documents=0)
    with pytest.raises(ConfigError, match="hf needs a dataset"):
        read("hf")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DataConfig(name="txt"), "unknown kind of data for data\n.*txt\n.*text"),
        (DataConfig(name="python_stdlib", files="x"), "data.files does not apply to python_stdlib"),
        (DataConfig(name="text", path="x"), "data.path does not apply to text"),
        (DataConfig(name="text", domains={}), "data.domains does not apply to text"),
        (DataConfig(name="mixture"), "a mixture needs domains"),
        (DataConfig(name="mixture", domains={"a": DomainConfig(name="mixture", weight=1)}), "unknown kind"),
        (DataConfig(name="mixture", domains={"a": DomainConfig(name="text", weight=0)}), "a.weight is not positive"),
        (
            DataConfig(name="mixture", domains={"a": DomainConfig(name="text", weight=float("nan"))}),
            "a.weight is not positive",
        ),
        (
            DataConfig(name="mixture", domains={"a": DomainConfig(name="text", split="x", weight=1)}),
            "data.domains.a.split does not apply to text",
        ),
    ],
)
def test_bad_options(config: DataConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.sources()
