"""The record of a run, whoever keeps it: what every reader of a kind of store makes."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_log = logging.getLogger("upcycle")


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The record of a run.

    Attributes:
        name: where it was found; the same for the parts of one run.
        content: what run.json holds.
        parts: read what metrics.jsonl holds, which is large: lines of JSON, each an object with `step`, `time` and
            metrics. The last one may be cut off.
    """

    name: str
    content: Mapping[str, Any]
    parts: tuple[Callable[[], bytes], ...]

    def rows(self) -> bytes:
        """Read all rows but one that is cut off, which is said."""
        return b"".join(map(self._whole, self.parts))

    def _whole(self, part: Callable[[], bytes]) -> bytes:
        rows = part()
        if rows and not rows.endswith(b"\n"):
            _log.warning("%s: its last row is cut off and was skipped", self.name)
            return rows[: rows.rfind(b"\n") + 1]
        return rows
