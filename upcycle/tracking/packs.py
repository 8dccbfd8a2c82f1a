"""Packs: the records of a sweep's finished runs as one file, DIR/NAME.runs.parquet beside its index DIR/NAME.json.

A pack has one row per run and step, those of a run one after the other. Its columns are `run`, the name that the run's
directory has or had in DIR; `run_json`, the text of run.json, in the run's first row alone; `step`, `time` and the
metrics as in `tracking.rows`, null where the run logged none.

A run that has a directory as well as a place in a pack is what its directory says.
"""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from upcycle.errors import RecordError
from upcycle.files.json import NotJsonError, parse_json
from upcycle.tracking.record import in_todays_words, look_for_run

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

SUFFIX = ".runs.parquet"
NAME, TEXT = "run", "run_json"
ALWAYS = ("step", "time")  # columns that every run has


@dataclass(frozen=True, kw_only=True)
class PackedRun:
    """A run as a pack has it.

    Attributes:
        text: of run.json.
        columns: its rows, as `tracking.rows` makes them.
    """

    text: str
    columns: pa.RecordBatch


def packs_in(output: Path) -> list[Path]:
    """The packs of a directory, by name."""
    return sorted(output.glob(f"*{SUFFIX}"))


def pack_of(directory: Path) -> Path | None:
    """The pack that holds the run of a directory, which need not be there any more; None if none does.

    Raises:
        RecordError: a pack cannot be read.
    """
    return next((file for file in packs_in(directory.parent) if directory.name in run_texts(file)), None)


def find_run(directory: Path) -> dict[str, Any] | None:
    """The content of a run's run.json, from its directory or else from a pack; None where neither has it.

    Raises:
        SourceError: the run.json of its directory is damaged.
        RecordError: a pack cannot be read.
    """
    content = look_for_run(directory)
    if content is not None:
        return content
    file = pack_of(directory)
    return packed_content(file, directory.name) if file else None


def packed_content(file: Path, name: str) -> dict[str, Any]:
    """The content of the run.json of a run in a pack.

    Raises:
        RecordError: the pack cannot be read.
    """
    try:
        content = parse_json(run_texts(file)[name])
    except NotJsonError as error:
        raise _damage(file, f"{TEXT} of {name} is {error}") from error
    if not isinstance(content, dict):
        raise _damage(file, f"{TEXT} of {name} is no object")
    return dict(in_todays_words(content))


def run_texts(file: Path) -> Mapping[str, str]:
    """The text of the run.json of every run in a pack, by the runs' names. Read once, until the file changes.

    Raises:
        RecordError: the pack cannot be read.
    """
    status = file.stat()
    return _run_texts(file, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=64)
def _run_texts(file: Path, _size: int, _mtime_ns: int) -> Mapping[str, str]:
    table = _read(file, [NAME, TEXT])
    first = table.filter(table[TEXT].is_valid())
    return dict(zip(first[NAME].to_pylist(), first[TEXT].to_pylist(), strict=True))


def read_pack(file: Path) -> dict[str, PackedRun]:
    """Every run of a pack, by name.

    Raises:
        RecordError: the pack cannot be read.
    """
    [rows] = _read(file).combine_chunks().to_batches()
    first_R = np.flatnonzero(rows[TEXT].is_valid())
    runs = {}
    for first, stop in zip(first_R, [*first_R[1:], len(rows)], strict=True):
        run = rows.slice(first, stop - first)
        logged = [each for each in run.schema.names if each in ALWAYS or run[each].null_count < len(run)]
        columns = run.select([each for each in logged if each not in (NAME, TEXT)])
        runs[run[NAME][0].as_py()] = PackedRun(text=run[TEXT][0].as_py(), columns=columns)
    return runs


def _read(file: Path, names: Sequence[str] | None = None) -> pa.Table:
    try:
        with pq.ParquetFile(file, page_checksum_verification=True) as pack:
            missing = {NAME, TEXT, *ALWAYS} - set(pack.schema_arrow.names)
            if missing:
                raise _damage(file, f"no column {', '.join(sorted(missing))}")
            table = pack.read(columns=names)
    except (OSError, pa.ArrowException) as error:
        raise _damage(file, " ".join(str(error).split())) from error
    if not len(table) or not table[TEXT][0].is_valid:
        raise _damage(file, f"no {TEXT} in its first row")
    return table


def _damage(file: Path, reason: object) -> RecordError:
    return RecordError(
        "a pack of runs cannot be read",
        found=f"{file}: {reason}",
        expected="what upcycle pack wrote",
        remedy="put back a copy of it; or delete it, and `upcycle train -m +sweeps=NAME` trains its runs again",
    )
