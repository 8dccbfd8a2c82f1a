"""The records that a report is made from: the runs of a sweep, what its arms are called, and what became of them."""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upcycle.analysis.outcomes import measured
from upcycle.analysis.records import read_records
from upcycle.analysis.runs import load_runs
from upcycle.errors import ConfigError, RecordError
from upcycle.sweep.index import need_index, read_indexes
from upcycle.sweep.job import ERROR_LINES, last_lines
from upcycle.tracking.packs import find_run, pack_of
from upcycle.tracking.record import METRICS
from upcycle.tracking.status import FAILED

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pandas as pd


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """A run, begun or not.

    Attributes:
        name: as in the frame's column `run`.
        arm: its arm.
        seed: its seed.
        status: what run.json says; None if it never began.
        content: of run.json; empty if it never began.
        error: the last lines of what it printed, if it failed.
    """

    name: str
    arm: str
    seed: int
    status: str | None
    content: Mapping[str, Any]
    error: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Records:
    """Runs, and the question that they were made for.

    Attributes:
        name: of the sweep, or of the directory.
        texts: question, hypothesis and published outcome, as far as they are known.
        metric: the sweep's; None without one.
        rows: as `load_runs` gives them, with a column `arm`.
        runs: all runs, in the order of the sweep.
    """

    name: str
    texts: Mapping[str, str]
    metric: str | None
    rows: pd.DataFrame
    runs: tuple[RunFacts, ...]

    @property
    def arms(self) -> tuple[str, ...]:
        """Names in the order of the sweep."""
        return tuple(dict.fromkeys(run.arm for run in self.runs))


def read_place(place: Path, *, name: str | None, arms: str | Sequence[str] | None) -> Records:
    """Read the runs of a sweep, or all runs below a directory.

    Args:
        place: the output of a sweep, or another directory.
        name: of the sweep; None where there is one only.
        arms: options whose values name the arms; None for those of the sweep.

    Raises:
        RecordError: no such sweep, several of them, no runs, or records that cannot be read.
        ConfigError: nothing names the arms.
    """
    index = _index(place, name)
    if index is None and arms is None:
        load_runs(place)  # what is wrong with the place comes first
        raise ConfigError(
            "nothing names the arms of these runs",
            found=f"no index of a sweep in {place}",
            expected="the output of `upcycle train -m +sweeps=NAME`, or arms=OPTION",
            remedy="add arms=moe.top_k, or whichever option the runs differ in",
        )
    named = index["runs"] if index else {}
    places = [place / run for run in named if _logged(place / run)] if index else [place]
    if not places:
        raise RecordError("no run of the sweep has logged anything yet", found=place)
    rows = load_runs(*places)
    if arms is None:
        rows = rows.assign(arm=rows["run"].astype(object).map(lambda run: named[Path(run).name]["arm"]))
    else:
        rows = measured(rows, "step", arms)
    texts = {text: index[text] for text in ("question", "hypothesis", "published")} if index else {}
    return Records(
        name=index["sweep"] if index else place.resolve().name,
        texts=texts,
        metric=index["metric"] if index else None,
        rows=rows,
        runs=tuple(_of_index(place, named, rows) if index else _below(place, rows)),
    )


def _index(place: Path, name: str | None) -> dict[str, Any] | None:
    """What a sweep wrote about itself; None where there is none and none was asked for."""
    if name is not None:
        return need_index(place, name)
    found = read_indexes(place)
    if len(found) > 1:
        raise RecordError("several sweeps are there", found=", ".join(found), expected="one", remedy="add name=NAME")
    return next(iter(found.values()), None)


def _logged(run: Path) -> bool:
    """Whether there are rows of a run, in its directory or in a pack."""
    return (run / METRICS).exists() or pack_of(run) is not None


def _of_index(place: Path, named: Mapping[str, Any], rows: pd.DataFrame) -> list[RunFacts]:
    arms = dict(zip(rows["run"], rows["arm"], strict=True))
    runs = []
    for directory, entry in named.items():
        run = place / directory
        runs.append(_facts(str(run), arms.get(str(run), entry["arm"]), entry["seed"], find_run(run) or {}))
    return runs


def _below(place: Path, rows: pd.DataFrame) -> list[RunFacts]:
    arms = dict(zip(rows["run"], rows["arm"], strict=True))
    records = [record for record in read_records([place]) if record.name in arms]
    return [_facts(each.name, arms[each.name], each.content["config"]["seed"], each.content) for each in records]


def _facts(name: str, arm: str, seed: int, content: Mapping[str, Any]) -> RunFacts:
    status = content.get("status")
    error = last_lines(Path(name)) if status in (FAILED, None) else ()
    error = error or tuple(str(content.get("error", "")).splitlines()[-ERROR_LINES:])
    return RunFacts(name=name, arm=arm, seed=seed, status=status, content=content, error=error)
