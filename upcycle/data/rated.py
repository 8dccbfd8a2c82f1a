"""Texts with a number for each of several attributes, in a fixed order. Knows files and lexicons, not tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from upcycle.data.lexicons import LEXICONS
from upcycle.data.rows import no_field, opened, reader_of
from upcycle.data.sources import file_errors, matching_files, text_of
from upcycle.errors import SourceError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from upcycle.data.config import DataConfig

MASK: Final = -100.0  # the label of an attribute that a row does not have, as in NeMo-Aligner
PROMPT, RESPONSE = "prompt", "response"
BETWEEN: Final = "\n\n"  # prompt and response


@dataclass(frozen=True)
class Rated:
    """A text, and its labels in the order of the attributes; MASK where one is missing."""

    text: str
    labels: tuple[float, ...]


def read_rated(config: DataConfig) -> list[Rated]:
    """The rows that have a text and a label at least.

    Raises:
        ConfigError: text without attributes, attributes that the data has not, or no such file.
        MissingPackageError: the package with the lexicon is not installed.
        SourceError: a file that cannot be read; a label that is no number; an attribute of which no row has one.
    """
    names = config.rated()
    if config.name in LEXICONS:
        rows: Iterator[tuple[str, str, dict[str, Any]]] = LEXICONS[config.name]()
    else:
        rows = _files(matching_files(config.files), config.field)
    found = [Rated(text, tuple(_label(row, name, where) for name in names)) for where, text, row in rows]
    for index, name in enumerate(names):
        if all(row.labels[index] == MASK for row in found):
            raise SourceError(
                f"no row has a label of {name}",
                found=f"{len(found)} rows",
                expected="a number in some of them",
                remedy="leave it out of data.attributes, or name the column that has it",
            )
    return [row for row in found if row.text and any(label != MASK for label in row.labels)]


def _files(files: list[Path], field: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for file in files:
        reader = reader_of(file)
        if reader is None:
            raise SourceError("the file has no rows", found=file, expected="rows as .jsonl, .json or .parquet")
        with file_errors(file), opened(file) as stream:
            for where, row in reader(stream, file, None):
                if not isinstance(row, dict):
                    raise no_field(field, where, ())
                yield where, _text(row, field, where), row


def _text(row: dict[str, Any], field: str, where: str) -> str:
    """The column `field`, or prompt and response, as HelpSteer has them."""
    if field not in row and PROMPT in row and RESPONSE in row:
        return text_of(row, PROMPT, where) + BETWEEN + text_of(row, RESPONSE, where)
    return text_of(row, field, where)


def _label(row: dict[str, Any], name: str, where: str) -> float:
    value = row.get(name)
    if value is None:
        return MASK
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise SourceError(
            f"the label {name} is not a number",
            found=f"{where}: {value!r}",
            expected=f"a finite number; {MASK:g}, null or nothing where there is none",
        )
    return float(value)
