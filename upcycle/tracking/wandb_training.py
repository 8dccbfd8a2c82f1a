"""The W&B mirror of a run in training: whatever W&B does, training goes on and the record is whole."""

from __future__ import annotations

import logging
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from upcycle.tracking.record import RUN, read_run
from upcycle.tracking.status import FAILED
from upcycle.tracking.wandb_mirror import Mirror, agents_identity, artifacts, new_identity, open_mirror
from upcycle.tracking.wandb_offline import offline_rows, set_aside, unsent_logs

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType
    from typing import Self

    from upcycle.tracking.config import WandbConfig
    from upcycle.tracking.record import Record

_log = logging.getLogger("upcycle")


class TrainingMirror:
    """Follows a record while the context lasts, and finishes the W&B run in any case.

    Args:
        record: of the run; its run.json, if there is one, is that of the run to go on with.
        options: `wandb.*`.
    """

    def __init__(self, record: Record, options: WandbConfig) -> None:
        self._record, self._options = record, options
        self._online = options.mode == "online"
        self._mirror: Mirror | None = None
        resumed = (record.directory / RUN).is_file() and not record.overwrite
        self._identity = read_run(record.directory).get("wandb") if resumed else None

    def __enter__(self) -> Self:
        """Open the W&B run."""
        if self._options.mode != "disabled":
            options = self._options
            self._identity = agents_identity() or self._identity or new_identity(options.project, options.entity)
        if self._identity:
            self._record.describe(wandb=self._identity)
        if self._options.mode != "disabled":
            with self._surviving():
                self._open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Finish the W&B run with the status of the record."""
        with self._surviving():
            self._close()

    def update(self) -> None:
        """Hand over what is new in the record."""
        with self._surviving():
            if self._mirror:
                self._mirror.update()

    def _open(self) -> None:
        directory = self._record.directory
        assert self._identity
        if not self._online and "rows" in self._identity:
            # An offline run is sent as a whole: it would have to know which rows the server has.
            _log.info("W&B has the run already: what is new is sent by `upcycle sync %s`", directory)
            return
        held = 0 if self._online else offline_rows(directory)
        self._mirror = open_mirror(directory, read_run(directory), online=self._online, held=held)
        if self._online:
            set_aside(unsent_logs(directory))  # all rows come from the record now
            self._identity |= {"rows": 0, "url": self._mirror.url}
            self._record.describe(wandb=self._identity)
            _log.info("W&B: %s", self._mirror.url)

    def _close(self) -> None:
        if self._mirror:
            directory = self._record.directory
            content = read_run(directory)
            self._mirror.finish(content["status"], artifacts(directory, content))

    @contextmanager
    def _surviving(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a mirror is not worth a run, and its client raises what its parts raise
            reason = str(error).partition("\n")[0] or type(error).__name__
            directory = self._record.directory
            _log.warning("no W&B mirror (%s): the record is whole; send it with `upcycle sync %s`", reason, directory)
            mirror, self._mirror = self._mirror, None
            if mirror:
                with suppress(Exception):
                    mirror.close(FAILED)
