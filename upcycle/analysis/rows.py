"""Rows of records -> columns: parses the JSON lines of many runs, and joins the rows of one step.

Shapes: M rows as they were logged, over all runs; S pairs of run and step.
"""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.json

from upcycle.errors import RecordError
from upcycle.tracking.schema import METRICS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from upcycle.analysis.records import RunRecord

BLOCK_BYTES = 16 * 1024**2  # a row may not be longer
# Metrics that have their columns even where no run logged them; those of layers and domains follow the runs.
_ALWAYS = pa.schema(
    [
        ("step", pa.int64()),
        ("time", pa.timestamp("us", tz="UTC")),
        *((metric.name, pa.float64()) for metric in METRICS if "{" not in metric.name),
    ]
)


def read_rows(records: Sequence[RunRecord]) -> tuple[NDArray[np.int64], pd.DataFrame]:
    """The rows of all runs, one per run and step, by run and step.

    Args:
        records: runs, each with rows.

    Returns:
        The index of each row's run, [S], and `step`, `time` and the metrics, [S, …].

    Raises:
        RecordError: a row is damaged, or has no step.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        tables = list(pool.map(_parse, records))
    table = pa.concat_tables(tables, promote_options="permissive")
    run_M = np.repeat(np.arange(len(records)), [each.num_rows for each in tables])
    step_M = table["step"].to_numpy()
    _, first_S, pair_M = np.unique(run_M * (step_M.max() + 1) + step_M, return_index=True, return_inverse=True)
    columns = {name: _joined(table[name], pair_M, len(first_S)) for name in table.column_names if name != "step"}
    return run_M[first_S], pd.DataFrame({"step": step_M[first_S], **columns})


def _parse(record: RunRecord) -> pa.Table:
    try:
        table = pyarrow.json.read_json(
            pa.BufferReader(record.rows),
            read_options=pyarrow.json.ReadOptions(block_size=BLOCK_BYTES, use_threads=False),
            parse_options=pyarrow.json.ParseOptions(explicit_schema=_ALWAYS),
        )
    except pa.ArrowInvalid as error:
        raise _damage(record, str(error)) from error
    if table["step"].null_count:
        raise _damage(record, "a row without a step")
    return table


def _joined(column: pa.ChunkedArray, pair_M: NDArray[np.int64], pairs: int) -> NDArray[np.float64] | pd.Series:
    """What the rows of a pair say together, [S]; where several say it, the last."""
    if pa.types.is_floating(column.type) or pa.types.is_integer(column.type):
        value_M = column.to_numpy().astype(np.float64, copy=False)
        said_M = ~np.isnan(value_M)
        value_S = np.full(pairs, np.nan)
        value_S[pair_M[said_M]] = value_M[said_M]
        return value_S
    said_M = column.is_valid().to_numpy()
    row_S = np.full(pairs, -1)
    row_S[pair_M[said_M]] = np.flatnonzero(said_M)
    value = column.combine_chunks().take(pa.array(row_S, mask=row_S < 0))
    return pd.Series(value, dtype=pd.ArrowDtype(value.type)) if pa.types.is_list(value.type) else value.to_pandas()


def _damage(record: RunRecord, why: str) -> RecordError:
    """The error that names the first row which is not an object with a step."""
    for number, line in enumerate(record.rows.splitlines(), start=1):
        try:
            json.loads(line)["step"]
        except (ValueError, KeyError, TypeError) as error:
            return RecordError(
                "a row of a record is damaged",
                found=f"{record.name}, row {number}: {error!r}",
                expected="a JSON object with a step",
                remedy="delete the line, or train again",
            )
    return RecordError("the rows of a record do not fit together", found=f"{record.name}: {why}")
