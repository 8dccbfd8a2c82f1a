"""Reads runs from a W&B server, through its client's public API."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from upcycle.analysis.run_record import RunRecord
from upcycle.analysis.wandb_history import record_rows
from upcycle.errors import RecordError
from upcycle.options.extras import need

if TYPE_CHECKING:
    from wandb.apis.public import Run

SCHEME = "wandb:"


def read_server(place: str) -> list[RunRecord]:
    """Read the runs of a project, or those of a group in it.

    Args:
        place: `wandb:ENTITY/PROJECT` or `wandb:ENTITY/PROJECT/GROUP`.

    Raises:
        MissingPackageError: wandb is not installed.
        RecordError: not such a place, or the server has no runs there, does not know it or does not answer.
    """
    need(f"reading {SCHEME}…", "wandb")
    parts = place.removeprefix(SCHEME).split("/", 2)
    if len(parts) < 2 or not all(parts):
        raise RecordError(
            "not a place at W&B", found=place, expected=f"{SCHEME}ENTITY/PROJECT or {SCHEME}ENTITY/PROJECT/GROUP"
        )
    entity, project, *group = parts
    try:
        import wandb

        runs = wandb.Api().runs(f"{entity}/{project}", filters={"group": group[0]} if group else None, lazy=False)
        found = [_record(f"{SCHEME}{entity}/{project}/{run.id}", run) for run in runs]
    except Exception as error:  # W&B's client raises what its parts raise
        raise _unread(place, error) from error
    if not found:
        raise RecordError("no runs found", found=place, expected="a project, or a group in it, with runs")
    return found


def _record(name: str, run: Run) -> RunRecord:
    def rows() -> bytes:
        try:
            return record_rows(run.scan_history(use_cache=False))
        except Exception as error:  # as above
            raise _unread(name, error) from error

    summary: Any = run.summary
    content: dict[str, Any] = {**run.config, "status": summary.get("status")}
    return RunRecord(name=name, content=content, parts=(rows,))


def _unread(place: str, error: Exception) -> RecordError:
    return RecordError("W&B cannot be read", found=f"{place}: {' '.join(str(error).split()) or type(error).__name__}")
