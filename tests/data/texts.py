"""Text for the tests of the data: small documents on disk, options that name them, and the byte tokenizer."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from upcycle.data.bytes_tokenizer import byte_tokenizer
from upcycle.data.config import DataConfig
from upcycle.data.corpus import build_corpus

if TYPE_CHECKING:
    from pathlib import Path

    from upcycle.data.corpus import Corpus

EOS = 256
tokenizer = functools.cache(byte_tokenizer)


def texts(count: int, *, word: str = "text") -> list[str]:
    """Documents that differ in content and length."""
    return [f"{word} {number} " + "é" * number + "\n" for number in range(count)]


def write(directory: Path, documents: list[str]) -> Path:
    """Write a document per file."""
    directory.mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(documents):
        (directory / f"{number:03}.txt").write_bytes(text.encode())
    return directory


def options(root: Path, **changes: Any) -> DataConfig:
    """Options for the text files below a directory, with a cache beside it."""
    fields = {"name": "text", "files": f"{root}/**/*.txt", "held_out": 0, "cache_dir": str(root.parent / "cache")}
    return DataConfig(**fields | changes)


def corpus(config: DataConfig, *, length: int = 8) -> Corpus:
    """The corpus of bytes."""
    return build_corpus(config, tokenizer(), sequence_length=length)
