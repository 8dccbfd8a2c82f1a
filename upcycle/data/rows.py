"""The rows of a file of rows, by its suffix, compressed or not. Knows bytes, JSON and pyarrow, not documents."""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import zlib
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from upcycle.errors import SourceError
from upcycle.files.json import NotJsonError, parse_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    Reader = Callable[[BinaryIO, Path, str | None], Iterator[tuple[str, Any]]]

BOM: Final = "\ufeff"  # what some editors begin UTF-8 with
CSV_BLOCK: Final = 2**28  # bytes that a row of .csv may have
HEAD: Final = 2**16  # bytes that decide what a file looks like
_ARRAY: Final = re.compile(r'\[\s*\{\s*"')
_JSON: Final = "an array of objects or strings, or one object per line"


def reader_of(file: Path) -> Reader | None:
    """What reads the rows of a file: places and rows, each an object or a text. None for a file that is one text.

    A reader is called with the file's content, its path, and the column that is wanted, None for all. It raises
    SourceError for what cannot be read, and UnicodeDecodeError for what is not UTF-8.
    """
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in _DECOMPRESS:
        suffixes.pop()
    return _READERS.get(suffixes[-1]) if suffixes else None


@contextmanager
def opened(file: Path) -> Iterator[BinaryIO]:
    """The content of a file, decompressed where its suffix says so.

    Raises:
        SourceError: what is compressed is cut off or damaged.
        OSError: the file cannot be read.
    """
    try:
        with _DECOMPRESS.get(file.suffix.lower(), _plain)(file) as stream:
            yield stream
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise SourceError(
            "the file cannot be decompressed", found=f"{file}: {error}", remedy="copy or download it again"
        ) from error


def looks_like_rows(head: bytes) -> bool:
    """Whether text that begins so is plainly rows of JSON: an array of objects, or an object on each of two lines."""
    text = head.decode(errors="ignore").removeprefix(BOM).lstrip()
    if text.startswith("["):
        return bool(_ARRAY.match(text))
    lines = [line for line in text.splitlines() if line.strip()][:2]
    return len(lines) == 2 and all(_is_object(line) for line in lines)


def no_field(field: str, where: str, names: Iterable[str]) -> SourceError:
    """The error for a row without the column that is wanted."""
    return SourceError(
        f"a document has no field {field}",
        found=f"{where}: {', '.join(f'{name:.40}' for name in names) or 'no fields'}",
        expected=field,
        remedy="set the option `field` to the one that holds the text",
    )


def _is_object(line: str) -> bool:
    try:
        return isinstance(parse_json(line), dict)
    except NotJsonError:
        return False


def _lines(stream: BinaryIO, file: Path, _field: str | None) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(stream, start=1):
        text = line.decode()
        text = text.removeprefix(BOM) if number == 1 else text
        if text.strip():
            try:
                yield f"{file}:{number}", parse_json(text)
            except NotJsonError as error:
                raise SourceError("a line is not JSON", found=f"{file}:{number}: {error}") from error


def _json(stream: BinaryIO, file: Path, field: str | None) -> Iterator[tuple[str, Any]]:
    """An array is read whole."""
    data = stream.read()
    text = data.decode().removeprefix(BOM)
    try:
        content = parse_json(text)
    except NotJsonError as error:
        if _is_object(text.lstrip().partition("\n")[0]):
            yield from _lines(io.BytesIO(data), file, field)
            return
        raise SourceError(
            "the file is not JSON",
            found=f"{file}: {error}",
            expected=_JSON,
            remedy="mend it; a file that is meant as one text ends in .txt",
        ) from error
    rows = content if isinstance(content, list) else [content]
    yield from ((f"{file}, row {number}", row) for number, row in enumerate(rows, start=1))


def _delimited(delimiter: str) -> Reader:
    def read(stream: BinaryIO, file: Path, field: str | None) -> Iterator[tuple[str, Any]]:
        if field is None:
            raise SourceError(
                "columns of numbers are not read from such a file",
                found=file,
                expected="rows as .jsonl, .json or .parquet",
                remedy="write it as .jsonl, an object for each row",
            )
        import pyarrow
        from pyarrow import csv

        form = {
            "read_options": csv.ReadOptions(block_size=CSV_BLOCK),
            "parse_options": csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        }
        as_text = csv.ConvertOptions(
            include_columns=[field], column_types={field: pyarrow.string()}, strings_can_be_null=False
        )
        try:
            with opened(file) as start:
                _check_columns(csv.open_csv(start, **form).schema.names, file, field)
            batches = csv.open_csv(stream, **form, convert_options=as_text)
            number = 0
            for batch in batches:
                for text in batch.column(field).to_pylist():
                    number += 1
                    yield f"{file}, row {number}", {field: text}
        except pyarrow.ArrowInvalid as error:
            raise SourceError(
                f"the file is not {file.suffix.lstrip('.')} with a line of names", found=f"{file}: {error}"
            ) from error

    return read


def _parquet(stream: BinaryIO, file: Path, field: str | None) -> Iterator[tuple[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    seekable = stream if file.suffix.lower() == ".parquet" else io.BytesIO(stream.read())
    try:
        with parquet.ParquetFile(seekable) as table:
            if field is not None:
                _check_columns(table.schema_arrow.names, file, field)
            for batch in table.iter_batches(columns=None if field is None else [field]):
                yield from ((str(file), row) for row in batch.to_pylist())
    except pyarrow.ArrowInvalid as error:
        raise SourceError("the file is not parquet", found=f"{file}: {error}") from error


def _check_columns(names: list[str], file: Path, field: str) -> None:
    if field not in names:
        raise no_field(field, str(file), names)
    if names.count(field) > 1:
        raise SourceError(
            f"several columns are named {field}", found=f"{file}: {', '.join(names)}", expected="one", remedy="rename"
        )


def _plain(file: Path) -> Any:
    return file.open("rb")


def _zstd(file: Path) -> Any:
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(file), compression="zstd"))


_DECOMPRESS: Final[dict[str, Callable[[Path], Any]]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _zstd,
}
_READERS: Final[dict[str, Reader]] = {
    ".jsonl": _lines,
    ".ndjson": _lines,
    ".json": _json,
    ".csv": _delimited(","),
    ".tsv": _delimited("\t"),
    ".parquet": _parquet,
}
