"""Finds records of runs, whoever keeps them: run directories, packs, W&B offline directories, and W&B servers.

A reader turns its kind of store into a `RunRecord`; all that follows is the same for every kind.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cache, partial
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

from upcycle.analysis.run_record import RunRecord
from upcycle.analysis.wandb_api import SCHEME, read_server
from upcycle.analysis.wandb_offline import read_offline
from upcycle.errors import RecordError, near_misses
from upcycle.tracking.packs import SUFFIX, PackedRun, pack_of, packed_content, read_pack, run_texts
from upcycle.tracking.record import METRICS, RUN, check_schema, check_training_run, in_todays_words, read_run
from upcycle.tracking.rows import kept_columns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    Reader = Callable[[Path], RunRecord]
    Packs = Callable[[Path], Mapping[str, PackedRun]]


def read_local(directory: Path) -> RunRecord:
    """Read a directory that `upcycle train` wrote."""
    return RunRecord(
        name=str(directory),
        content=read_run(directory),
        parts=(partial(_metrics, directory),),
        kept=kept_columns(directory),
    )


def read_packed(directory: Path, *, file: Path, packs: Packs) -> RunRecord:
    """Read from a pack what was a run's directory."""
    content, run = packed_content(file, directory.name), packs(file)[directory.name]
    return RunRecord(name=str(directory), content=content, parts=(), kept=run.columns)


def _metrics(directory: Path) -> bytes:
    metrics = directory / METRICS
    return metrics.read_bytes() if metrics.exists() else b""


# Which files make a directory a run of which kind.
READERS: tuple[tuple[Callable[[str], bool], Reader], ...] = (
    (lambda file: file == RUN, read_local),
    (lambda file: file.endswith(".wandb"), read_offline),
)


def read_records(places: Sequence[str | Path]) -> list[RunRecord]:
    """Find every run at some places, in the order of the places and of the runs' names; at a server, of their start.

    A run that has a directory and is in a pack too counts once, as its directory says.

    Raises:
        RecordError: a place does not exist or holds no run; a run is another project's, or of another schema version;
            a pack cannot be read.
        SourceError: a run.json is damaged.
    """
    found: dict[str | Path, Callable[[], RunRecord]] = {}
    packs = cache(read_pack)  # once for all the runs in it
    for place in places:
        found |= _at_server(place) if str(place).startswith(SCHEME) else _below(Path(place).expanduser(), packs)
    runs: dict[str, RunRecord] = {}
    for read in found.values():
        part = read()
        check_training_run(part.content, part.name)
        check_schema(part.content, part.name)
        before = runs.get(part.name)
        parts = before.parts + part.parts if before else part.parts
        runs[part.name] = replace(part, content=in_todays_words(part.content), parts=parts)
    return list(runs.values())


def _at_server(place: str | Path) -> dict[str | Path, Callable[[], RunRecord]]:
    return {record.name: partial(_itself, record) for record in read_server(str(place))}


def _itself(record: RunRecord) -> RunRecord:
    return record


def _below(place: Path, packs: Packs) -> dict[str | Path, Callable[[], RunRecord]]:
    found: dict[str | Path, Callable[[], RunRecord]] = {
        directory.resolve(): partial(reader, directory)
        for directory, reader in sorted(_walk(place, packs), key=itemgetter(0))
    }
    pack = None if found else pack_of(place)
    if pack:
        return {place.resolve(): partial(read_packed, place, file=pack, packs=packs)}
    if not place.is_dir():
        siblings = [each.name for each in place.parent.iterdir()] if place.parent.is_dir() else []
        raise RecordError(
            "there is no such directory",
            found=place,
            expected="a directory of a run, or one above runs",
            remedy=near_misses(place.name, siblings) if siblings else None,
        )
    if not found:
        raise RecordError(
            "no runs found",
            found=place,
            expected=f"directories with {RUN}, which upcycle train writes, packs of them, or W&B offline directories",
        )
    return found


def _walk(place: Path, packs: Packs) -> Iterator[tuple[Path, Reader]]:
    """Directories of runs, those that are packed before those that are there.

    What lies inside a run's directory belongs to it.
    """
    for directory, subdirectories, files in os.walk(place):
        reader = next((reader for is_its, reader in READERS if any(map(is_its, files))), None)
        if reader:
            yield Path(directory), reader
            subdirectories.clear()
            continue
        for pack in (Path(directory, file) for file in files if file.endswith(SUFFIX)):
            for name in run_texts(pack):
                yield Path(directory, name), partial(read_packed, file=pack, packs=packs)
