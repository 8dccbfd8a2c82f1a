"""What the report lists besides figures: every run and how it ended, and what all of them were made with."""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from upcycle.tracking import schema
from upcycle.tracking.status import NOT_STARTED

if TYPE_CHECKING:
    from collections.abc import Mapping

    from upcycle.dashboard.records import Records

HASH_SHOWN = 12  # hexadecimal digits
NOT_RECORDED = "not recorded"


@dataclass(frozen=True, kw_only=True)
class RunRow:
    """A line of the list of runs.

    Attributes:
        arm, seed: which run.
        status: how it ended, or that it never began.
        steps: optimizer steps done, of those of the budget.
        value: of the metric, when it was measured last; None if it was not.
        minutes: of training, without start and end; None if it was not measured.
        directory: the run's.
        error: the last lines of what it printed, if it failed.
    """

    arm: str
    seed: int
    status: str
    steps: str
    value: float | None
    minutes: float | None
    directory: str
    error: tuple[str, ...]


def run_rows(records: Records, metric: str) -> list[RunRow]:
    """Every run, in the order of the records."""
    ends = records.rows.groupby("run", observed=True)
    steps, values = ends["step"].max(), ends[metric].last()
    seconds = ends["train/step_seconds"].mean() * steps
    rows = []
    for run in records.runs:
        done, budget = steps.get(run.name, 0), run.content.get("steps")
        rows.append(
            RunRow(
                arm=run.arm,
                seed=run.seed,
                status=run.status or NOT_STARTED,
                steps=f"{done:,} of {budget:,}" if budget else "–",
                value=_number(values.get(run.name)),
                minutes=_number(seconds.get(run.name, math.nan) / 60),
                directory=Path(run.name).name,
                error=run.error,
            )
        )
    return rows


def provenance(records: Records) -> dict[str, str]:
    """What the runs were made with, as they recorded it: words -> values, with their counts where runs differ."""
    contents = [run.content for run in records.runs if run.content]
    return {
        "dense model": _each(contents, lambda run: run["config"].get("source")),
        "text": _each(contents, lambda run: run["config"]["data"]["name"]),
        "hash of the text": _each(contents, lambda run: str(run["data_hash"])[:HASH_SHOWN]),
        "budget": _each(contents, lambda run: f"{run['steps'] * run['flops_per_step']:.3g} training FLOPs"),
        "versions": _each(contents, lambda run: _pairs(run["versions"])),
        "hardware": _each(contents, lambda run: _hardware(run["hardware"])),
        "commit": _each(contents, lambda run: run["git_commit"]),
    }


def unit_of(metric: str) -> str:
    """Its unit in the schema; empty without one."""
    known = schema.metric(metric)
    return known.unit if known and known.unit != "1" else ""


def _each(contents: list[Mapping[str, Any]], told: Any) -> str:
    values = Counter(_told(told, content) for content in contents)
    if len(values) == 1:
        return next(iter(values))
    return "; ".join(f"{value} ({count} runs)" for value, count in values.most_common())


def _told(told: Any, content: Mapping[str, Any]) -> str:
    try:
        return str(told(content) or NOT_RECORDED)
    except (KeyError, TypeError):
        return NOT_RECORDED


def _pairs(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _hardware(hardware: Mapping[str, Any]) -> str:
    parts = [hardware["machine"], f"{hardware['cpus']} CPUs", f"{hardware['threads']} used by a run"]
    return ", ".join([*parts, *hardware["gpus"]])


def _number(value: Any) -> float | None:
    return None if value is None or pd.isna(value) else float(value)
