"""Rows of a record -> columns: decodes JSON lines, joins the rows of one step, and keeps the columns of finished runs.

The columns of a run are an Arrow batch of `step`, `time` and the metrics that it logged: numbers, NaN where one was not
logged, and lists of numbers, null where one was not logged.

Shapes: M rows as a run logged them; S its steps; C metrics that are numbers.
"""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pyarrow as pa

from upcycle.errors import RecordError
from upcycle.files.durable import replacing, write_all
from upcycle.files.json import NotJsonError, parse_json
from upcycle.tracking.record import METRICS

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from numpy.typing import NDArray

COLUMNS = "metrics.arrow"  # a copy of metrics.jsonl, which takes a tenth of the time to read
TIME, LIST = pa.timestamp("us", tz="UTC"), pa.list_(pa.float64())


def keep_columns(directory: Path) -> None:
    """Write the columns of a run beside its rows.

    Raises:
        OutputError: they cannot be written.
        RecordError: a row is damaged.
    """
    metrics = directory / METRICS
    if not metrics.exists():
        return
    batch = RowDecoder().decode(str(directory), metrics.read_bytes())
    batch = batch.replace_schema_metadata(_identity(metrics))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    path = directory / COLUMNS
    with replacing(path) as descriptor:
        write_all(descriptor, memoryview(sink.getvalue()), path)


def kept_columns(directory: Path) -> pa.RecordBatch | None:
    """The columns that were kept of a run; None if there are none, or the rows have changed since."""
    try:
        batch = pa.ipc.open_file(pa.memory_map(str(directory / COLUMNS))).get_batch(0)
        return batch if batch.schema.metadata == _identity(directory / METRICS) else None
    except (OSError, pa.ArrowInvalid):
        return None


def _identity(metrics: Path) -> dict[bytes, bytes]:
    """What changes whenever the rows do."""
    status = metrics.stat()
    return {b"size": b"%d" % status.st_size, b"mtime_ns": b"%d" % status.st_mtime_ns}


class RowDecoder:
    """Decodes the rows of run after run, straight into the fields of a class with a field for every metric.

    A metric that no run had before is learned from the run that has it, which makes that run slow to decode.
    """

    def __init__(self) -> None:
        self._numbers: list[str] = []
        self._lists: list[str] = []
        self._prepare()

    def decode(self, name: str, rows: bytes) -> pa.RecordBatch:
        """The columns of a run.

        Args:
            name: of the run.
            rows: whole lines of JSON, at least one.

        Raises:
            RecordError: a row is damaged.
        """
        try:
            decoded = self._decoder.decode_lines(rows)
        except msgspec.MsgspecError:  # a metric that is new, a number that JSON lacks, or damage
            decoded = self._decode_slowly(name, rows)
        count = 1 + len(self._numbers)
        number_M = struct.Struct(f"{count}d")
        packed = b"".join([number_M.pack(*msgspec.structs.astuple(row)[:count]) for row in decoded])
        number_MC = np.frombuffer(packed).reshape(-1, count)
        step_S, group_M, count_S = np.unique(number_MC[:, 0], return_inverse=True, return_counts=True)
        number_SC = _joined(number_MC[:, 1:], group_M, count_S)
        logged = np.flatnonzero(~np.isnan(number_SC).all(0))
        columns = {"step": pa.array(step_S.astype(np.int64)), "time": self._times(name, decoded, group_M)}
        columns |= {self._numbers[i]: pa.array(number_SC[:, i]) for i in logged}
        for i, each in enumerate(self._lists):
            column_S = _last(pa.array([getattr(row, f"list_{i}") for row in decoded], LIST), group_M)
            if column_S.null_count < len(column_S):
                columns[each] = column_S
        return pa.RecordBatch.from_pydict(columns)

    def _times(self, name: str, decoded: list[Any], group_M: NDArray[np.int64]) -> pa.Array:
        try:
            return _last(pa.array([row.time for row in decoded], pa.string()).cast(TIME), group_M)
        except pa.ArrowInvalid as error:
            raise RecordError("the time of a row is damaged", found=f"{name}: {error}") from error

    def _prepare(self) -> None:
        """Make the class of a row, whose fields are the step, the numbers, the time and the lists."""
        numbers = {f"number_{i}": name for i, name in enumerate(self._numbers)}
        lists = {f"list_{i}": name for i, name in enumerate(self._lists)}
        fields: list[Any] = [("step", int)]
        fields += [(field, float, math.nan) for field in numbers]
        fields += [("time", str | None, None), *((field, list[float] | None, None) for field in lists)]
        names = numbers | lists
        self._row = msgspec.defstruct("Row", fields, kw_only=True, rename=names, forbid_unknown_fields=True, gc=False)
        self._decoder = msgspec.json.Decoder(self._row)

    def _decode_slowly(self, name: str, rows: bytes) -> list[msgspec.Struct]:
        parsed = []
        for number, line in enumerate(rows.splitlines(), start=1):
            try:
                parsed.append(parse_json(line))
            except NotJsonError as error:
                raise _damage(name, number, error) from error
        self._learn(row for row in parsed if isinstance(row, dict))
        decoded = []
        for number, row in enumerate(parsed, start=1):
            said = {key: value for key, value in row.items() if value is not None} if isinstance(row, dict) else row
            try:
                decoded.append(msgspec.convert(said, self._row))
            except msgspec.ValidationError as error:
                raise _damage(name, number, error) from error
        return decoded

    def _learn(self, rows: Iterable[dict[str, Any]]) -> None:
        known = {"step", "time", *self._numbers, *self._lists}
        for row in rows:
            for name, value in row.items():
                if name not in known and value is not None:
                    (self._lists if isinstance(value, list) else self._numbers).append(name)
                    known.add(name)
        self._prepare()


def _joined(
    number_MC: NDArray[np.float64], group_M: NDArray[np.int64], count_S: NDArray[np.int64]
) -> NDArray[np.float64]:
    """What the rows of a step say together, [S, C]; where several say it, the last."""
    number_SC = np.empty((len(count_S), number_MC.shape[1]))
    number_SC[group_M] = number_MC  # of a step's rows the last; then what only earlier ones say
    said_MC = (count_S[group_M] > 1)[:, None] & ~np.isnan(number_MC)
    row, column = np.nonzero(said_MC)
    number_SC[group_M[row], column] = number_MC[row, column]
    return number_SC


def _last(value_M: pa.Array, group_M: NDArray[np.int64]) -> pa.Array:
    """The last value of each group that is not null, [S]."""
    said_M = value_M.is_valid().to_numpy(zero_copy_only=False)
    row_S = np.full(group_M.max() + 1, -1)
    row_S[group_M[said_M]] = np.flatnonzero(said_M)
    return value_M.take(pa.array(row_S, mask=row_S < 0))


def _damage(name: str, number: int, error: Exception) -> RecordError:
    return RecordError(
        "a row of a record is damaged",
        found=f"{name}, row {number}: {error}",
        expected="a JSON object with a step and metrics",
        remedy="delete the line, or train again",
    )
