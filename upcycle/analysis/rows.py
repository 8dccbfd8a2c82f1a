"""The columns of many runs as one frame.

Shapes: S steps, each of one run; C metrics that are numbers.
"""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pyarrow as pa

from upcycle.tracking.rows import LIST
from upcycle.tracking.schema import METRICS

if TYPE_CHECKING:
    from collections.abc import Sequence

# Metrics that have their columns even where no run logged them; those of layers and domains follow the runs.
_ALWAYS = tuple(metric.name for metric in METRICS if "{" not in metric.name)


def rows_frame(runs: Sequence[pa.RecordBatch]) -> pd.DataFrame:
    """`step`, `time` and the metrics of runs, one after the other, [S, …].

    Args:
        runs: columns of each, at least one.
    """
    fields = {field.name: field.type for run in runs for field in run.schema if field.name not in ("step", "time")}
    numbers = list(dict.fromkeys([*_ALWAYS, *(name for name, kind in fields.items() if kind != LIST)]))
    place = {name: i for i, name in enumerate(numbers)}
    number_CS = np.full((len(numbers), sum(map(len, runs))), np.nan)
    start = 0
    for run in runs:
        for name, column in zip(run.schema.names, run.columns, strict=True):
            if name in place:
                number_CS[place[name], start : start + len(run)] = column.to_numpy()
        start += len(run)
    step = pa.chunked_array([run["step"] for run in runs]).to_numpy()
    time = pa.chunked_array([run["time"] for run in runs]).to_pandas()
    lists = pd.DataFrame({name: _lists(name, runs) for name, kind in fields.items() if kind == LIST})
    return pd.concat(
        [pd.DataFrame({"step": step, "time": time}), pd.DataFrame(number_CS.T, columns=numbers, copy=False), lists],
        axis=1,
    )


def _lists(name: str, runs: Sequence[pa.RecordBatch]) -> pd.Series:
    chunks = [run[name] if name in run.schema.names else pa.nulls(len(run), LIST) for run in runs]
    return pd.Series(pa.chunked_array(chunks), dtype=pd.ArrowDtype(LIST))
