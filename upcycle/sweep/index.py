"""DIR/NAME.json, what a sweep says about itself: its question, and which directory is which arm with which seed."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from upcycle.errors import RecordError, near_misses
from upcycle.files.durable import locked, write_text
from upcycle.files.json import NotJsonError, parse_json

if TYPE_CHECKING:
    from pathlib import Path

    from upcycle.sweep.plan import SweepPlan

TEXTS, OF_RUN = {"question", "hypothesis", "published", "metric"}, {"arm", "seed"}


def write_index(plan: SweepPlan, output: Path) -> None:
    """Add the runs of a plan to its sweep's index; earlier ones stay named.

    Raises:
        OutputError: it cannot be written.
        RecordError: as for `read_index`.
    """
    output.mkdir(parents=True, exist_ok=True)
    with locked(output / f".{plan.name}.lock"):  # W&B's agents start arms of one sweep side by side
        earlier = (read_index(output, plan.name) or {}).get("runs", {})
        now = {
            job.directory.name: {"arm": job.arm, "seed": job.seed, "overrides": list(job.overrides)}
            for job in plan.jobs
        }
        content = {"sweep": plan.name, **asdict(plan.sweep), "runs": earlier | now}
        write_text(_path(output, plan.name), json.dumps(content, indent=1) + "\n")


def read_index(output: Path, name: str) -> dict[str, Any] | None:
    """The index of a sweep; None where it was not started in that directory.

    Raises:
        RecordError: it is damaged.
    """
    path = _path(output, name)
    if not path.exists():
        return None
    index = _index(path)
    if index is None:
        raise _damage(path)
    return index


def need_index(output: Path, name: str) -> dict[str, Any]:
    """The index of a sweep.

    Raises:
        RecordError: it was not started in that directory, or the index is damaged.
    """
    index = read_index(output, name)
    if index is None:
        known = read_indexes(output)
        raise RecordError("unknown sweep", found=name, remedy=near_misses(name, known) if known else None)
    return index


def read_indexes(output: Path) -> dict[str, dict[str, Any]]:
    """The indexes of all sweeps that were started in a directory, by the sweeps' names; other files are none.

    Raises:
        RecordError: one is damaged.
    """
    contents = [_index(file) for file in sorted(output.glob("*.json"))]
    return {each["sweep"]: each for each in contents if each}


def check_output(output: Path) -> None:
    """Raise RecordError if there is no such directory."""
    if not output.is_dir():
        raise RecordError("there is no such directory", found=output, expected="the output of a sweep")


def _index(file: Path) -> dict[str, Any] | None:
    """What a file says, if it is an index.

    Raises:
        RecordError: it is one, and lacks something.
    """
    try:
        content = parse_json(file.read_bytes())
    except (NotJsonError, IsADirectoryError):
        return None
    if not isinstance(content, dict) or not {"sweep", "runs"} <= content.keys():
        return None
    runs = content["runs"]
    named = isinstance(runs, dict) and all(isinstance(each, dict) and each.keys() >= OF_RUN for each in runs.values())
    if not named or not content.keys() >= TEXTS:
        raise _damage(file)
    return content


def _damage(file: Path) -> RecordError:
    return RecordError(
        "the index of the sweep is damaged",
        found=file,
        expected="what upcycle train -m +sweeps=NAME wrote",
        remedy="delete it, and start the sweep again: what has finished is not run again",
    )


def _path(output: Path, name: str) -> Path:
    return output / f"{name}.json"
