"""Token files named after the content they were made from: built once, checked at every opening. Knows bytes only.

Legend: D documents, T tokens. An entry is a directory with
    tokens.npy     [T] uint16 or uint32, the documents' tokens one after the other
    bounds.npy     [D + 1, 2] int64, where every document begins: in tokens, and in bytes of its UTF-8 text
    header.json    SHA-256 of both
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from upcycle.checkpoint import sha256_file
from upcycle.errors import OutputError
from upcycle.files.json import parse_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

TOKENS, BOUNDS, HEADER = "tokens.npy", "bounds.npy", "header.json"
_log = logging.getLogger("upcycle")


@dataclass(frozen=True, kw_only=True)
class TokenFile:
    """Tokenised documents.

    Attributes:
        tokens: [T], memory-mapped.
        bounds: [D + 1, 2], first token and first byte of every document, and the totals.
    """

    tokens: NDArray[Any]
    bounds: NDArray[np.int64]


def default_cache() -> Path:
    """`$XDG_CACHE_HOME/upcycle/data`, by default `~/.cache/upcycle/data`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "upcycle" / "data"


def cached_tokens(directory: Path, key: str, build: Callable[[Path], None]) -> TokenFile:
    """The entry of a key, built if it is not there or damaged; processes that want the same entry wait for the first.

    Args:
        directory: the cache.
        key: identifies the content of the entry.
        build: writes tokens.npy and bounds.npy into the directory that it is given.

    Raises:
        OutputError: the cache cannot be written.
    """
    entry = directory / key
    with _errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
    with _locked(directory / f"{key}.lock"):
        if entry.exists():
            damage = _damage(entry)
            if damage is None:
                return _open(entry)
            _log.warning("the token cache %s is damaged (%s): building it anew", entry, damage)
        draft = directory / f"{key}.partial"
        with _errors(directory):
            for leftover in filter(Path.exists, (draft, entry)):
                shutil.rmtree(leftover)
            draft.mkdir()
            build(draft)
            header = {name: sha256_file(draft / name) for name in (TOKENS, BOUNDS)}
            (draft / HEADER).write_text(json.dumps(header))
            draft.rename(entry)
        return _open(entry)


def _damage(entry: Path) -> str | None:
    """What is wrong with an entry, or None. Hashing costs about a second per gigabyte, and finds every change."""
    try:
        header = parse_json((entry / HEADER).read_bytes())
        changed = [name for name in (TOKENS, BOUNDS) if sha256_file(entry / name) != header[name]]
    except (OSError, ValueError, LookupError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return f"the content of {', '.join(changed)} has changed" if changed else None


def _open(entry: Path) -> TokenFile:
    return TokenFile(tokens=np.load(entry / TOKENS, mmap_mode="r"), bounds=np.load(entry / BOUNDS))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that the operating system drops when the process ends. Its file stays, for others may wait on it."""
    with _errors(path.parent):
        stream = path.open("w")
    with stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


@contextmanager
def _errors(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            "the token cache cannot be written",
            found=f"{error.filename or directory}: {error.strerror or error}",
            remedy="free space there, or set data.cache_dir",
        ) from error
