"""The record of a run, whoever keeps it: what every reader of a kind of store makes."""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import pyarrow as pa

    from upcycle.tracking.rows import RowDecoder

_log = logging.getLogger("upcycle")


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The record of a run.

    Attributes:
        name: where it was found; the same for the parts of one run.
        content: what run.json holds.
        parts: read what metrics.jsonl holds, which is large: lines of JSON, each an object with `step`, `time` and
            metrics. The last one may be cut off.
        kept: columns of the same rows, if the run kept them.
    """

    name: str
    content: Mapping[str, Any]
    parts: tuple[Callable[[], bytes], ...]
    kept: pa.RecordBatch | None = None

    def columns(self, decoder: RowDecoder) -> pa.RecordBatch | None:
        """The columns of its rows; None if there are none.

        Raises:
            RecordError: a row is damaged.
        """
        if self.kept is not None:
            return self.kept
        rows = b"".join(map(self._whole, self.parts))
        return decoder.decode(self.name, rows) if rows else None

    def _whole(self, part: Callable[[], bytes]) -> bytes:
        rows = part()
        if rows and not rows.endswith(b"\n"):
            _log.warning("%s: its last row is cut off and was skipped", self.name)
            return rows[: rows.rfind(b"\n") + 1]
        return rows
