"""`upcycle sync`: sends to W&B what is in the records of runs and not there yet."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upcycle.errors import ConfigError, RecordError
from upcycle.options.extras import need
from upcycle.tracking.claim import claimed
from upcycle.tracking.record import METRICS, RUN, Record, read_own_run, read_run
from upcycle.tracking.wandb_mirror import Identity, artifacts, new_identity, open_mirror
from upcycle.tracking.wandb_offline import rows_of, send_log, set_aside, unsent_logs

if TYPE_CHECKING:
    from upcycle.tracking.config import SyncConfig


@dataclass(frozen=True, kw_only=True)
class Synced:
    """What became of a run.

    Attributes:
        directory: the run's.
        rows: in its record.
        unsent: those that the server is not known to have.
        url: where the run is; None if the server does not know it.
        error: why not all were sent.
    """

    directory: Path
    rows: int = 0
    unsent: int = 0
    url: str | None = None
    error: str | None = None


def sync(config: SyncConfig) -> list[Synced]:
    """Send what the server lacks of every run below a directory.

    Rows that a run kept in offline mode go through W&B's own sync, with its system metrics; all others are read from
    the record. A run that cannot be sent costs the others nothing; a server that cannot be reached is not tried twice.

    Raises:
        MissingPackageError: wandb is not installed.
        RecordError: no runs found.
    """
    need("upcycle sync", "wandb")
    synced, down = [], None
    for directory in _runs_below(Path(config.path).expanduser()):
        found = Synced(directory=directory)
        try:
            found = _look(directory)
            if found.unsent and not down:
                with claimed(directory):
                    found = replace(found, unsent=0, url=_send(directory, found.rows, config))
        except ValueError as error:  # this run's: a damaged record, or an UpcycleError
            found = replace(found, error=_line(error))
        except Exception as error:  # W&B's client raises what its parts raise
            down = _line(error)
        synced.append(replace(found, error=down) if found.unsent and down and not found.error else found)
    return synced


def _runs_below(place: Path) -> list[Path]:
    found = sorted(file.parent for file in place.rglob(RUN))
    if not found:
        raise RecordError("no runs found", found=place, expected=f"directories with {RUN}, which upcycle train writes")
    return found


def _look(directory: Path) -> Synced:
    content = read_own_run(directory)
    metrics = directory / METRICS
    rows = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
    identity = content.get("wandb") or {}
    unsent = max(0, rows - identity.get("rows", 0))
    return Synced(directory=directory, rows=rows, unsent=unsent, url=identity.get("url"))


def _send(directory: Path, rows: int, config: SyncConfig) -> str | None:
    content, record = read_run(directory), Record(directory)
    identity = content.get("wandb") or _identity(content, config)
    record.describe(**{**content, "wandb": identity})  # before anything is sent: the next try goes to the same run
    content = read_run(directory)
    mirror = open_mirror(directory, content, online=True)
    held = mirror.rows
    if logs := unsent_logs(directory):
        mirror.close(content["status"])
        for log in logs:
            if (of := rows_of(log)).start == held and of:
                send_log(log)
                held = of.stop
            else:  # sent already, or in part: the record fills in what is missing
                set_aside([log])
        if held < rows:
            mirror = open_mirror(directory, content, online=True)
    if held < rows or not logs:
        mirror.finish(content["status"], artifacts(directory, content))
    record.describe(wandb={**identity, "url": mirror.url, "rows": rows})
    return mirror.url


def _identity(content: dict[str, Any], config: SyncConfig) -> Identity:
    options = content["config"].get("wandb") or {}
    project = config.project or options.get("project")
    if project is None:
        raise ConfigError("the run names no W&B project", found="null", remedy="add project=NAME")
    return new_identity(project, config.entity or options.get("entity"))


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
