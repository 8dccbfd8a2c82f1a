"""Rows of records -> columns: decodes the JSON lines of one run after the other, and joins the rows of one step.

Shapes: M rows as a run logged them; S steps, each of one run; C metrics that are numbers.
"""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pandas as pd
import pyarrow as pa

from upcycle.errors import RecordError
from upcycle.tracking.schema import METRICS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

TIME, LIST = pa.timestamp("us", tz="UTC"), pa.list_(pa.float64())


@dataclass(frozen=True, kw_only=True)
class RunRows:
    """The rows of one run, by step.

    Attributes:
        step_S: optimizer steps.
        time_S: when the last row of each was logged.
        number_SC: metrics; NaN where one was not logged.
        lists: metrics that are lists, [S] each; null where one was not logged.
    """

    step_S: NDArray[np.int64]
    time_S: pa.Array
    number_SC: NDArray[np.float64]
    lists: tuple[pa.Array, ...]


class RowDecoder:
    """Decodes the rows of run after run, straight into the fields of a class with a field for every metric.

    A metric that no run had before is learned from the run that has it, which makes that run slow to read.

    Attributes:
        numbers: names of the C metrics that are numbers; those of layers and domains follow the runs.
        lists: names of the metrics that are lists of numbers.
    """

    def __init__(self) -> None:
        self.numbers = [metric.name for metric in METRICS if "{" not in metric.name]
        self.lists: list[str] = []
        self._prepare()

    def decode(self, name: str, rows: bytes) -> RunRows:
        """Decode the rows of a run.

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
        count = 1 + len(self.numbers)
        number_M = struct.Struct(f"{count}d")
        packed = b"".join([number_M.pack(*msgspec.structs.astuple(row)[:count]) for row in decoded])
        number_MC = np.frombuffer(packed).reshape(-1, count)
        step_S, group_M, count_S = np.unique(number_MC[:, 0], return_inverse=True, return_counts=True)
        time_M, *list_M = (pa.array([getattr(row, field) for row in decoded], kind) for field, kind in self._others)
        try:
            time_M = time_M.cast(TIME)
        except pa.ArrowInvalid as error:
            raise RecordError("the time of a row is damaged", found=f"{name}: {error}") from error
        return RunRows(
            step_S=step_S.astype(np.int64),
            time_S=_last(time_M, group_M, len(step_S)),
            number_SC=_joined(number_MC[:, 1:], group_M, count_S),
            lists=tuple(_last(each, group_M, len(step_S)) for each in list_M),
        )

    def frame(self, runs: Sequence[RunRows]) -> pd.DataFrame:
        """`step`, `time` and the metrics of runs that were decoded, one after the other, [S, …]."""
        ends = np.cumsum([len(run.step_S) for run in runs])
        number_CS = np.full((len(self.numbers), ends[-1]), np.nan)
        for run, end in zip(runs, ends, strict=True):
            number_CS[: run.number_SC.shape[1], end - len(run.step_S) : end] = run.number_SC.T
        steps = pd.DataFrame(
            {
                "step": np.concatenate([run.step_S for run in runs]),
                "time": pa.chunked_array([run.time_S for run in runs]).to_pandas(),
            }
        )
        lists = pd.DataFrame({name: self._list(i, runs) for i, name in enumerate(self.lists)})
        return pd.concat([steps, pd.DataFrame(number_CS.T, columns=self.numbers, copy=False), lists], axis=1)

    def _list(self, i: int, runs: Sequence[RunRows]) -> pd.Series:
        chunks = [run.lists[i] if i < len(run.lists) else pa.nulls(len(run.step_S), LIST) for run in runs]
        return pd.Series(pa.chunked_array(chunks), dtype=pd.ArrowDtype(LIST))

    def _prepare(self) -> None:
        """Make the class of a row, whose fields are the step, the numbers, the time and the lists."""
        number = {f"number_{i}": name for i, name in enumerate(self.numbers)}
        lists = {f"list_{i}": name for i, name in enumerate(self.lists)}
        fields: list[Any] = [("step", int)]
        fields += [(field, float, math.nan) for field in number]
        fields += [("time", str | None, None), *((field, list[float] | None, None) for field in lists)]
        self._others = (("time", pa.string()), *((field, LIST) for field in lists))
        self._row = msgspec.defstruct(
            "Row", fields, kw_only=True, rename=number | lists, forbid_unknown_fields=True, gc=False
        )
        self._decoder = msgspec.json.Decoder(self._row)

    def _decode_slowly(self, name: str, rows: bytes) -> list[msgspec.Struct]:
        parsed = []
        for number, line in enumerate(rows.splitlines(), start=1):
            try:
                parsed.append(json.loads(line))
            except ValueError as error:
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
        known = {"step", "time", *self.numbers, *self.lists}
        for row in rows:
            for name, value in row.items():
                if name not in known:
                    (self.lists if isinstance(value, list) else self.numbers).append(name)
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


def _last(value_M: pa.Array, group_M: NDArray[np.int64], groups: int) -> pa.Array:
    """The last value of each group that is not null."""
    said_M = value_M.is_valid().to_numpy(zero_copy_only=False)
    row_S = np.full(groups, -1)
    row_S[group_M[said_M]] = np.flatnonzero(said_M)
    return value_M.take(pa.array(row_S, mask=row_S < 0))


def _damage(name: str, number: int, error: Exception) -> RecordError:
    return RecordError(
        "a row of a record is damaged",
        found=f"{name}, row {number}: {error}",
        expected="a JSON object with a step and metrics",
        remedy="delete the line, or train again",
    )
