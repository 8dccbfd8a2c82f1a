"""`upcycle pack`: the finished runs of a directory's sweeps, from a directory each to a file a sweep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from upcycle.errors import RecordError, listed
from upcycle.files.durable import locked
from upcycle.models.source import expanded
from upcycle.sweep.index import check_output, need_index, read_indexes
from upcycle.tracking.claim import claimed
from upcycle.tracking.packing import others_than_record, read_directory, remove, same, write_pack
from upcycle.tracking.packs import SUFFIX, packs_in, read_pack
from upcycle.tracking.record import RUN, read_own_run
from upcycle.tracking.rows import RowDecoder
from upcycle.tracking.status import FINISHED

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from upcycle.sweep.config import PackConfig
    from upcycle.tracking.packs import PackedRun

LOCK = ".pack.lock"


@dataclass(frozen=True, kw_only=True)
class Packing:
    """What became of a directory.

    Attributes:
        packs: how many runs each pack holds, and how many of them it did not hold before as they are now.
        kept: directories of runs that are still there, and why.
    """

    packs: Mapping[Path, tuple[int, int]]
    kept: Mapping[Path, str]


def pack(config: PackConfig) -> Packing:
    """Put the finished runs of sweeps into packs, and delete those of their directories that hold nothing else.

    A run goes to the pack that holds it already, where it is replaced if its directory says otherwise; or else to the
    pack of the first sweep, by name, that names it. So no run is in two packs. A directory with more than the record,
    such as checkpoints, is kept.

    Raises:
        RecordError: no such directory or sweep, no finished run, or a record or a pack that cannot be read.
        SourceError: a run.json is damaged.
        OutputError: a pack cannot be written, a directory cannot be deleted, or another process works at its run.
    """
    output = expanded(config.runs)
    check_output(output)
    homes = _homes(output, config.name)
    with locked(output / LOCK):
        packs = {file: read_pack(file) for file in packs_in(output)}
        homes |= {name: file for file, runs in packs.items() for name in runs if name in homes}
        runs, kept = _finished(output, homes)
        changed = _merge(packs, runs, homes)
        packed = {name: packs[file][name] for name, file in homes.items() if name in packs.get(file, {})}
        if not packed:
            raise RecordError("no run of the sweeps has finished", found=output, expected="runs to pack")
        for name in sorted(packed.keys() - {directory.name for directory in kept}):
            reason = _clear(output / name, packed[name])
            if reason:
                kept[output / name] = reason
    if config.name is None:
        strangers = {file.parent for file in output.glob(f"*/{RUN}") if file.parent.name not in homes}
        kept |= dict.fromkeys(strangers, "no sweep's index names it")
    counts = {file: (len(packs[file]), changed.get(file, 0)) for file in sorted({homes[name] for name in packed})}
    return Packing(packs=counts, kept=dict(sorted(kept.items())))


def _homes(output: Path, name: str | None) -> dict[str, Path]:
    """Every run that the sweeps name, and the pack that it goes to if none holds it yet."""
    indexes = {name: need_index(output, name)} if name is not None else read_indexes(output)
    if not indexes:
        raise RecordError(
            "no sweep was started there", found=output, expected="the output of `upcycle train -m +sweeps=NAME`"
        )
    homes: dict[str, Path] = {}
    for sweep, index in indexes.items():
        homes = dict.fromkeys(index["runs"], output / f"{sweep}{SUFFIX}") | homes
    return homes


def _finished(output: Path, names: Iterable[str]) -> tuple[dict[str, PackedRun], dict[Path, str]]:
    """The finished runs that have directories; and the other directories of runs, and what is in the way."""
    decoder = RowDecoder()
    runs: dict[str, PackedRun] = {}
    others: dict[Path, str] = {}
    for name in names:
        directory = output / name
        if not (directory / RUN).exists():
            continue
        status = read_own_run(directory).get("status")
        run = read_directory(directory, decoder) if status == FINISHED else None
        if run:
            runs[name] = run
        else:
            others[directory] = "nothing was logged" if status == FINISHED else f"its status is {status}"
    return runs, others


def _merge(
    packs: dict[Path, dict[str, PackedRun]], runs: Mapping[str, PackedRun], homes: Mapping[str, Path]
) -> dict[Path, int]:
    """Put runs into packs, and write those that change; how many runs of them do."""
    changed: dict[Path, int] = {}
    for name, run in runs.items():
        pack = packs.setdefault(homes[name], {})
        if name not in pack or not same(pack[name], run):
            pack[name] = run
            changed[homes[name]] = changed.get(homes[name], 0) + 1
    for file in changed:
        write_pack(file, packs[file])
    return changed


def _clear(directory: Path, packed: PackedRun) -> str | None:
    """Delete the directory of a packed run, or say why not."""
    if not directory.is_dir():
        return None
    if directory.is_symlink():
        return "it is a link"
    others = others_than_record(directory)
    if others:
        return f"it holds {listed(others)} besides the record"
    with claimed(directory):
        now = read_directory(directory, RowDecoder()) if (directory / RUN).exists() else packed
        if now is None or not same(now, packed):
            return "it changed meanwhile: pack it again"
        remove(directory)
    return None
