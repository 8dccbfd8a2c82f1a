"""Makes packs: runs' directories as they are read, packs as they are written, and directories that go when packed."""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from upcycle.errors import OutputError, RecordError
from upcycle.files.durable import DRAFT_SUFFIX, output_errors, replacing, sync_directory, write_all
from upcycle.tracking.claim import LOCK
from upcycle.tracking.packs import NAME, TEXT, PackedRun, read_pack
from upcycle.tracking.record import METRICS, RUN
from upcycle.tracking.rows import COLUMNS, LIST, RowDecoder

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

OWN = (RUN, METRICS, COLUMNS, LOCK)  # files of a record; without the first a directory is no run
LEVEL = 9  # of zstd; higher ones take far longer for 2 % less


def read_directory(directory: Path, decoder: RowDecoder) -> PackedRun | None:
    """A run as a pack will have it, from run.json and metrics.jsonl; None if it logged nothing.

    Raises:
        RecordError: a row is damaged, or a metric has a name that packs use themselves.
    """
    metrics = directory / METRICS
    rows = metrics.read_bytes() if metrics.exists() else b""
    if not rows:
        return None
    columns = decoder.decode(str(directory), rows)
    taken = {NAME, TEXT} & set(columns.schema.names)
    if taken:
        raise RecordError(
            "a metric has the name of a column of packs",
            found=f"{directory}: {', '.join(sorted(taken))}",
            expected="a name of tracking/schema.py",
        )
    return PackedRun(text=(directory / RUN).read_text(encoding="utf-8"), columns=columns)


def write_pack(file: Path, runs: Mapping[str, PackedRun]) -> None:
    """Write a pack, or replace it, once what is read back from it is the same.

    Args:
        file: the pack.
        runs: all of its runs, by name.

    Raises:
        OutputError: it cannot be written, or does not come back as it was given.
        RecordError: a metric is a number in one run and a list in another.
    """
    try:
        table = pa.concat_tables([_rows(name, runs[name]) for name in sorted(runs)], promote_options="default")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise RecordError("a metric is a number in one run and a list in another", found=error) from error
    sink = pa.BufferOutputStream()
    pq.write_table(
        table, sink, compression="zstd", compression_level=LEVEL, use_dictionary=[NAME], write_page_checksum=True
    )
    with replacing(file) as descriptor:
        write_all(descriptor, memoryview(sink.getvalue()), file)
        written = read_pack(file.with_name(file.name + DRAFT_SUFFIX))
        if written.keys() != runs.keys() or not all(same(written[name], run) for name, run in runs.items()):
            raise OutputError(f"{file} does not come back as it was written", expected="the same runs, bit for bit")
    sync_directory(file.parent)


def same(one: PackedRun, other: PackedRun) -> bool:
    """Whether two runs say the same, bit for bit, in whatever order their columns are."""
    names = one.columns.schema.names
    return (
        one.text == other.text
        and set(names) == set(other.columns.schema.names)
        and all(_bits(one.columns[name]).equals(_bits(other.columns[name])) for name in names)
    )


def others_than_record(directory: Path) -> list[str]:
    """What a run's directory holds besides its record, such as checkpoints; empty directories are nothing."""
    own = {directory / name for name in OWN}
    files = (path for path in directory.rglob("*") if path not in own and (path.is_symlink() or not path.is_dir()))
    return sorted({path.relative_to(directory).parts[0] for path in files})


def remove(directory: Path) -> None:
    """Delete the directory of a run that holds nothing but its record. Killed half-way, it leaves no run.

    Raises:
        OutputError: it cannot be deleted.
    """
    with output_errors(directory):
        for name in OWN:
            (directory / name).unlink(missing_ok=True)
        for inner in sorted((path for path in directory.rglob("*") if path.is_dir()), reverse=True):
            inner.rmdir()
        directory.rmdir()


def _rows(name: str, run: PackedRun) -> pa.Table:
    count = len(run.columns)
    text = pa.array([run.text, *[None] * (count - 1)], pa.string())
    own = {NAME: pa.repeat(name, count), TEXT: text}
    return pa.table({**own, **dict(zip(run.columns.schema.names, run.columns.columns, strict=True))})


def _bits(column: pa.Array) -> pa.Array:
    """Numbers as integers of the same bits, since Arrow takes no NaN for another."""
    if pa.types.is_float64(column.type):
        return column.view(pa.int64())
    return column.view(pa.list_(pa.int64())) if column.type == LIST else column
