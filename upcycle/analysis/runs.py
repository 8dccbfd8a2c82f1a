"""`load_runs`: the records of many runs as one tidy frame."""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import hashlib
import json
import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from upcycle.analysis.outcomes import label
from upcycle.analysis.records import read_records
from upcycle.analysis.rows import rows_frame
from upcycle.errors import RecordError
from upcycle.tracking.record import flat
from upcycle.tracking.rows import RowDecoder

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from upcycle.analysis.run_record import RunRecord

_log = logging.getLogger("upcycle")
# Facts about a run, besides its options, that stand in its rows.
FACTS = ("status", "git_commit", "git_dirty", "data_hash", "order_hash", "steps", "flops_per_step")


def load_runs(*places: str | Path) -> pd.DataFrame:
    """The records of all runs at some places: run directories, packs, W&B offline directories, and a W&B server.

    One row per run and step at which anything was logged. Columns:

    - `run`, where it was found; `step`; `time`;
    - every metric of the schema by its name, in its unit, empty where it was not logged; `train/tokens` and
      `train/flops` stand in every row;
    - every option by its path, such as `moe.top_k` or `seed`: numbers where all runs have numbers, else text;
    - facts: `status`, `data_hash`, `order_hash`, `source_hash`, `steps` (of the budget), `flops_per_step`,
      `tokens_per_step`, `git_commit`, `git_dirty`. `source_hash` is of the dense model's files, whether it was upcycled
      in memory or before; of a mixture that was trained before, or that has no manifest, it is of its own files; it is
      empty where training started from random weights.

    Args:
        places: directories of runs, or above them; `wandb:ENTITY/PROJECT`, or `wandb:ENTITY/PROJECT/GROUP`.

    Returns:
        The frame, by run and step.

    Raises:
        RecordError: no runs, a run of another project or version of the schema, a damaged row or pack, a server that
            does not answer.
        SourceError: a run.json is damaged.
    """
    decoder, logged = RowDecoder(), []
    for record in read_records(places):
        columns = record.columns(decoder)
        if columns is None:
            _log.warning("%s: nothing was logged yet; left out", record.name)
        else:
            logged.append((record, columns))
    if not logged:
        raise RecordError("no run has logged anything yet", found=", ".join(map(str, places)))
    rows = rows_frame([columns for _, columns in logged])
    run_S = np.repeat(np.arange(len(logged)), [len(columns) for _, columns in logged])
    described = _described([record for record, _ in logged]).take(run_S).reset_index(drop=True)
    rows["train/tokens"] = rows["step"] * described["tokens_per_step"].astype(float)
    rows["train/flops"] = rows["step"] * described["flops_per_step"].astype(float)
    return pd.concat([described[["run"]], rows, described.drop(columns="run")], axis=1)


def _described(records: Sequence[RunRecord]) -> pd.DataFrame:
    """One row per run: its facts and options."""
    described = pd.DataFrame([_facts(record) for record in records])
    return pd.DataFrame({name: _typed(described[name]) for name in described})


def _facts(record: RunRecord) -> dict[str, Any]:
    content, options = record.content, record.content["config"]
    sources = content.get("source_sha256")
    facts = {name: content.get(name) for name in FACTS}
    facts["tokens_per_step"] = options["batch"]["sequences"] * options["sequence_length"]
    facts["source_hash"] = hashlib.sha256("".join(sorted(sources.values())).encode()).hexdigest() if sources else None
    return {"run": record.name, **facts, **flat(options)}


def _typed(column: pd.Series) -> pd.Series:
    """Numbers and truth values as they are; everything else as text, stored once per value."""
    if pd.api.types.is_numeric_dtype(column):
        return column
    return column.map(_text, na_action="ignore").astype("category")


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, list | dict) else label(value)
