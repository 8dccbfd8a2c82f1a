"""Finds records of runs, whoever keeps them: local run directories, and W&B offline directories.

A reader turns its kind of directory into a `RunRecord`; all that follows is the same for every kind.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from upcycle.analysis.wandb_offline import read_offline
from upcycle.errors import RecordError, near_misses
from upcycle.tracking.record import METRICS, RUN, read_run
from upcycle.tracking.schema import SCHEMA_VERSION

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

_log = logging.getLogger("upcycle")
# What run.json of a training run has, whatever its schema's version.
KNOWN_BY = ("config", "order_hash", "data_hash", "flops_per_step")


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The record of a run.

    Attributes:
        name: where it was found; the same for the parts of one run.
        content: what run.json holds.
        rows: what metrics.jsonl holds: whole lines of JSON, each an object with `step`, `time` and metrics.
    """

    name: str
    content: Mapping[str, Any]
    rows: bytes


class Reader(Protocol):
    """Reads one kind of directory."""

    def __call__(self, directory: Path) -> tuple[str, Mapping[str, Any], bytes]:
        """The run's name, the content of run.json, and the rows, of which the last may be cut off."""


def read_local(directory: Path) -> tuple[str, Mapping[str, Any], bytes]:
    """Read a directory that `upcycle train` wrote."""
    metrics = directory / METRICS
    return str(directory), read_run(directory), metrics.read_bytes() if metrics.exists() else b""


# Which files make a directory a run of which kind.
READERS: tuple[tuple[Callable[[str], bool], Reader], ...] = (
    (lambda file: file == RUN, read_local),
    (lambda file: file.endswith(".wandb"), read_offline),
)


def read_records(places: Sequence[str | Path]) -> list[RunRecord]:
    """Read every run below some places, in the order of the places and of their names.

    Raises:
        RecordError: a place does not exist or holds no run; a run is another project's, or of another schema version.
        SourceError: a run.json is damaged.
    """
    found = {
        directory.resolve(): (directory, reader)
        for place in places
        for directory, reader in _below(Path(place).expanduser())
    }
    runs: dict[str, RunRecord] = {}
    for directory, reader in found.values():
        part = _read(directory, reader)
        before = runs.get(part.name)
        runs[part.name] = replace(part, rows=before.rows + part.rows) if before else part
    return list(runs.values())


def _below(place: Path) -> list[tuple[Path, Reader]]:
    if not place.is_dir():
        siblings = [each.name for each in place.parent.iterdir()] if place.parent.is_dir() else []
        raise RecordError(
            "there is no such directory",
            found=place,
            expected="a directory of a run, or one above runs",
            remedy=near_misses(place.name, siblings) if siblings else None,
        )
    found = list(_walk(place))
    if not found:
        raise RecordError(
            "no runs found",
            found=place,
            expected=f"directories with {RUN}, which upcycle train writes, or W&B offline directories",
        )
    return found


def _walk(place: Path) -> Iterator[tuple[Path, Reader]]:
    """Runs by name; what lies inside a run's directory belongs to it."""
    for directory, subdirectories, files in os.walk(place):
        reader = next((reader for is_its, reader in READERS if any(map(is_its, files))), None)
        if reader:
            yield Path(directory), reader
            subdirectories.clear()
        subdirectories.sort()


def _read(directory: Path, reader: Reader) -> RunRecord:
    name, content, rows = reader(directory)
    missing = [each for each in KNOWN_BY if each not in content]
    if missing:
        raise RecordError(
            "this is not a training run of upcycle",
            found=f"{directory}, without {', '.join(missing)}",
            expected="directories of this project's runs alone",
        )
    if content.get("schema") != SCHEMA_VERSION:
        raise RecordError(
            "a run was recorded in another version of the schema",
            found=f"{directory}: schema {content.get('schema', 'without a number')}",
            expected=f"schema {SCHEMA_VERSION}",
            remedy="leave it out, or read it with the version of upcycle that wrote it",
        )
    if rows and not rows.endswith(b"\n"):
        rows = rows[: rows.rfind(b"\n") + 1]
        _log.warning("%s: its last row is cut off and was skipped", directory)
    return RunRecord(name=name, content=content, rows=rows)
