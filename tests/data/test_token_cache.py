"""The token cache: built once, found again by content, rebuilt when damaged, and safe with two processes."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from ended import Ended
from texts import EOS, corpus, options, texts, tokenizer, write
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from upcycle.data import tokens as tokens_module
from upcycle.data.cache import BOUNDS, HEADER, TOKENS, cached_tokens, default_cache
from upcycle.data.sources import Documents, open_documents
from upcycle.data.tokens import tokenise, tokenizer_identity
from upcycle.errors import ConfigError, OutputError, SourceError

if TYPE_CHECKING:
    from collections.abc import Callable

TEXTS = texts(12)


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    return write(tmp_path / "texts", TEXTS)


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The directories in which token files are built from now on."""
    seen: list[Path] = []
    build: Callable[..., None] = tokens_module._build

    def counted(directory: Path, *arguments: object) -> None:
        seen.append(directory)
        build(directory, *arguments)

    monkeypatch.setattr(tokens_module, "_build", counted)
    return seen


def entry_of(cache: Path) -> Path:
    (entry,) = (each for each in cache.iterdir() if each.is_dir())
    return entry


def test_every_document_with_its_end(tmp_path: Path) -> None:
    made = tokenise(Documents(lambda: TEXTS), tokenizer(), tmp_path)
    bounds = made.file.bounds
    found = [made.file.tokens[start:end].tolist() for start, end in zip(bounds[:-1, 0], bounds[1:, 0], strict=True)]
    assert all(ids[-1] == EOS for ids in found)
    assert sorted(bytes(ids[:-1]) for ids in found) == sorted(text.encode() for text in TEXTS)
    assert made.digests == sorted(made.digests)
    assert bounds[-1, 1] == sum(len(text.encode()) for text in TEXTS)
    assert made.file.tokens.dtype == np.uint16
    assert isinstance(made.file.tokens, np.memmap)


@pytest.mark.parametrize("batch", [1, 40, 2**23])
def test_batches_do_not_matter(tmp_path: Path, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens_module, "BATCH_BYTES", batch)
    made = tokenise(Documents(lambda: TEXTS), tokenizer(), tmp_path / str(batch))
    whole = tokenise(Documents(lambda: reversed(TEXTS)), tokenizer(), tmp_path / "whole")
    assert np.array_equal(made.file.tokens, whole.file.tokens)
    assert made.key == whole.key


def test_it_is_built_once_for_a_content(documents: Path, builds: list[Path]) -> None:
    first = corpus(options(documents))
    documents.rename(documents.with_name("elsewhere"))
    second = corpus(options(documents.with_name("elsewhere"), document_attention=True), length=4)
    assert len(builds) == 1
    assert first.hash == second.hash
    (documents.with_name("elsewhere") / "000.txt").write_text("something else")
    assert corpus(options(documents.with_name("elsewhere"))).hash != first.hash
    assert len(builds) == 2


def test_the_tokenizer_is_part_of_the_key(tmp_path: Path) -> None:
    tokenizer().save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer_identity(loaded) == tokenizer_identity(tokenizer())
    loaded(["a", "bcd"], padding=True, truncation=True, max_length=2)
    assert tokenizer_identity(loaded) == tokenizer_identity(tokenizer()), "a call leaves no trace"
    loaded.add_tokens(["def"])
    assert tokenizer_identity(loaded) != tokenizer_identity(tokenizer())


def test_a_tokenizer_without_end(tmp_path: Path) -> None:
    endless = PreTrainedTokenizerFast(tokenizer_object=tokenizer().backend_tokenizer)
    with pytest.raises(ConfigError, match="no end-of-text token"):
        tokenise(Documents(lambda: TEXTS), endless, tmp_path)


def _truncate(entry: Path) -> None:
    os.truncate(entry / TOKENS, (entry / TOKENS).stat().st_size - 2)


def _flip(entry: Path) -> None:
    content = bytearray((entry / TOKENS).read_bytes())
    content[-3] ^= 1
    (entry / TOKENS).write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated tokens": _truncate,
    "one bit of the tokens": _flip,
    "empty bounds": lambda entry: (entry / BOUNDS).write_bytes(b""),
    "no tokens": lambda entry: (entry / TOKENS).unlink(),
    "no header": lambda entry: (entry / HEADER).unlink(),
    "half a header": lambda entry: (entry / HEADER).write_text('{"tokens'),
    "another header": lambda entry: (entry / HEADER).write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_built_anew_and_said(
    documents: Path, builds: list[Path], damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = corpus(options(documents)).train[0]["input_ids"]
    entry = entry_of(documents.parent / "cache")
    DAMAGES[damage](entry)
    with caplog.at_level(logging.WARNING, logger="upcycle"):
        after = corpus(options(documents)).train[0]["input_ids"]
    assert torch.equal(before, after)
    assert len(builds) == 2
    assert f"the token cache {entry} is damaged" in caplog.text
    caplog.clear()
    corpus(options(documents))
    warned = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert (len(builds), warned) == (2, [])


def test_a_killed_build_leaves_nothing_that_counts(documents: Path, builds: list[Path]) -> None:
    corpus(options(documents))
    entry = entry_of(documents.parent / "cache")
    shutil.copytree(entry, entry.with_name(f"{entry.name}.partial"))
    shutil.rmtree(entry)
    corpus(options(documents))
    assert len(builds) == 2
    assert entry_of(documents.parent / "cache") == entry


def test_two_processes_at_once(documents: Path, tmp_path: Path) -> None:
    """Both get the tokens, and one of them builds while the other waits."""
    code = (
        "import sys, time, pathlib, numpy as np\n"
        "from upcycle.data.cache import cached_tokens\n"
        "def build(directory):\n"
        "    print('built', end=' ')\n"
        "    np.save(directory / 'bounds.npy', np.zeros((1, 2)))\n"
        "    time.sleep(0.5)\n"
        "    np.save(directory / 'tokens.npy', np.arange(9))\n"
        "print(cached_tokens(pathlib.Path(sys.argv[1]), 'key', build).tokens.sum())\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "shared")]
    pipe = subprocess.PIPE
    with Ended(command, stdout=pipe, text=True) as one, Ended(command, stdout=pipe, text=True) as other:
        said = sorted(process.communicate(timeout=60)[0].strip() for process in (one, other))
    assert said == ["36", "built 36"]


def test_documents_that_change_while_they_are_read(tmp_path: Path) -> None:
    for later in (["one", "other"], ["one"], ["one", "two", "three"]):
        versions = iter([["one", "two"], later])
        with pytest.raises(SourceError, match="changed while they were read"):
            tokenise(Documents(lambda versions=versions: next(versions)), tokenizer(), tmp_path / "cache")
    assert not [each for each in (tmp_path / "cache").iterdir() if each.suffix == ""]


def test_a_cache_that_cannot_be_written(documents: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"token cache cannot be written\n(.*\n)*.*data.cache_dir"):
        corpus(options(documents, cache_dir=str(tmp_path / "file")))


def test_a_full_disk(tmp_path: Path) -> None:
    def build(_directory: Path) -> None:
        Path("/dev/full").write_text("text")

    with pytest.raises(OutputError, match="No space left on device"):
        cached_tokens(tmp_path, "key", build)


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "upcycle" / "data"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_cache() == tmp_path / "home" / ".cache" / "upcycle" / "data"


def test_the_standard_library_is_read_again_from_the_cache(tmp_path: Path) -> None:
    source = open_documents(options(tmp_path, name="python_stdlib", files=None))
    few = Documents(lambda: list(source)[:20])
    assert tokenise(few, tokenizer(), tmp_path).key == tokenise(few, tokenizer(), tmp_path).key
