"""Documents of every kind of source as text, in a fixed order. Knows files and `datasets`, not tokens."""

from __future__ import annotations

import glob
import logging
import os
import sysconfig
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upcycle.data.rows import HEAD, looks_like_rows, no_field, opened, reader_of
from upcycle.errors import ConfigError, SourceError, listed
from upcycle.options.extras import need

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from upcycle.data.config import SourceConfig

_log = logging.getLogger("upcycle")
TESTS = {"test", "tests", "idle_test"}
NOT_THE_LIBRARY = {"site-packages", "dist-packages"}
# Written when Python was built, so not the same on every machine of a version.
BUILD_RECORDS = ("_sysconfigdata_*.py", "config-*/*.py")


@dataclass(frozen=True)
class Documents:
    """Documents that can be read more than once; empty ones are left out."""

    read: Callable[[], Iterable[str]]

    def __iter__(self) -> Iterator[str]:
        """The documents from the first on."""
        return filter(None, self.read())


def open_documents(source: SourceConfig) -> Documents:
    """The documents of a source, which are read when they are asked for.

    Raises:
        ConfigError: nothing is found where the options say.
        MissingPackageError: a dataset is asked for, and `datasets` is not installed.
        SourceError: now or while reading: a file or dataset that cannot be read, or lacks the field.
    """
    if source.name == "python_stdlib":
        return Documents(partial(_files, standard_library(), source.field))
    if source.name == "text":
        files = matching_files(source.files)
        _warn_of_rows(files)
        return Documents(partial(_files, files, source.field))
    return _hugging_face(source)


def standard_library() -> list[Path]:
    """The running interpreter's standard library: its .py files by path, without tests and installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    built = {file for pattern in BUILD_RECORDS for file in root.glob(pattern)}
    return [
        file
        for file in sorted(root.rglob("*.py"), key=lambda file: file.relative_to(root).as_posix())
        if not (TESTS | NOT_THE_LIBRARY) & set(file.relative_to(root).parts) and file not in built
    ]


def matching_files(patterns: str | Sequence[str] | None) -> list[Path]:
    given = [patterns] if isinstance(patterns, str) else list(patterns or ())
    if not given:
        raise ConfigError("text needs files", found="none", expected="paths or globs", remedy="add data.files=PATH")
    found: set[Path] = set()
    for pattern in given:
        expanded = os.path.expanduser(pattern)
        # A name that exists is meant literally, whatever brackets are in it.
        names = [expanded] if os.path.exists(expanded) else glob.glob(expanded, recursive=True)
        files = {Path(name) for name in names if os.path.isfile(name)}
        if not files:
            raise ConfigError(
                "no file matches",
                found=pattern,
                expected="a file, or a glob such as texts/**/*.txt",
                remedy=f"give {pattern.rstrip('/')}/** for the files of a directory"
                if os.path.isdir(expanded)
                else None,
            )
        found |= files
    return sorted(found)


def _warn_of_rows(files: Iterable[Path]) -> None:
    """Name the files that are one text each by their suffix, and rows by what is in them."""
    texts = [file for file in files if reader_of(file) is None]
    rows = [file for file in texts if looks_like_rows(_head(file))]
    if rows:
        names = listed(rows, shown=3)
        _log.warning("rows of JSON, taken as one document each, braces and all: %s (rename to .jsonl or .json)", names)


def _head(file: Path) -> bytes:
    with file_errors(file), opened(file) as stream:
        return stream.read(HEAD)


def _files(files: Iterable[Path], field: str) -> Iterator[str]:
    for file in files:
        reader = reader_of(file)
        with file_errors(file), opened(file) as stream:
            if reader is None:
                yield stream.read().decode()
            else:
                yield from (text_of(row, field, where) for where, row in reader(stream, file, field))


@contextmanager
def file_errors(file: Path) -> Iterator[None]:
    """What fails while a file is read, as the file's own failure.

    Raises:
        SourceError: it is not UTF-8, or cannot be read.
    """
    try:
        yield
    except UnicodeDecodeError as error:
        raise SourceError("the file is not UTF-8", found=f"{file}: {error}", remedy="convert it first") from error
    except OSError as error:
        raise SourceError("the file cannot be read", found=f"{file}: {error.strerror or error}") from error


def text_of(row: Any, field: str, where: str) -> str:
    """The text in a row.

    Args:
        row: an object, or a text.
        field: the column with the text.
        where: the row's place, for the message.

    Raises:
        SourceError: there is no such column, or no text that UTF-8 can say in it.
    """
    if isinstance(row, str):
        text: Any = row
    elif isinstance(row, dict) and field in row:
        text = row[field]
    else:
        raise no_field(field, where, row if isinstance(row, dict) else ())
    if not isinstance(text, str):
        raise SourceError(
            f"the field {field} is not text", found=f"{where}: {type(text).__name__}", expected="a string"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can escape half a character
        raise SourceError("a document cannot be written as UTF-8", found=f"{where}: {error}") from error
    return text


def _hugging_face(source: SourceConfig) -> Documents:
    if not source.path:
        raise ConfigError(
            "hf needs a dataset", found="none", expected="a name or directory", remedy="add data.path=NAME"
        )
    limit = source.max_documents
    if limit is not None and limit < 1:
        raise ConfigError("max_documents is not positive", found=limit, expected="at least 1, or null for all")
    if source.streaming and limit is None:
        raise ConfigError(
            "streaming has no end",
            found="max_documents=null",
            expected="a number of documents",
            remedy="add data.max_documents=NUMBER, or data.streaming=false",
        )
    rows = _load(source)

    def read() -> Iterator[str]:
        for number, row in enumerate(islice(rows, limit)):
            yield text_of(row, source.field, f"{source.path}, row {number}")

    if not source.streaming:
        return Documents(read)
    kept = list(read())  # a stream is not had twice without downloading it twice
    return Documents(lambda: kept)


def _load(source: SourceConfig) -> Iterable[Any]:
    """The rows, memory-mapped by `datasets` unless they are streamed."""
    need("data=hf", "datasets")
    import datasets  # type: ignore[import-untyped]

    path = os.path.expanduser(str(source.path))
    try:
        if any(os.path.exists(os.path.join(path, name)) for name in ("state.json", "dataset_dict.json")):
            saved = datasets.load_from_disk(path)
            rows: Iterable[Any] = saved[source.split] if isinstance(saved, datasets.DatasetDict) else saved
        else:
            rows = datasets.load_dataset(path, source.subset, split=source.split, streaming=source.streaming)
    except (OSError, ValueError, KeyError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise SourceError(
            "the dataset cannot be loaded",
            found=f"{source.path} ({source.subset or 'no subset'}, split {source.split}): {_first_line(error)}",
            remedy="check path, subset, split and the connection (HF_HUB_OFFLINE, HF_TOKEN), or give a local directory",
        ) from error
    return rows


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
