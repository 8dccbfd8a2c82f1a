"""Undoes what the mirror did to the rows of a record, for every reader of W&B's history."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

# W&B writes numbers that JSON lacks as text, and its reader of offline runs shows a histogram as three entries.
_NUMBERS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_HISTOGRAM, _NOT_LIST = ".values", ("._type", ".bins")


def record_rows(history: Iterable[Mapping[str, Any]]) -> bytes:
    """The rows of the record, as lines of JSON, that rows of W&B's history were made from."""
    return "".join(json.dumps(_row(item)) + "\n" for item in history).encode()


def _row(item: Mapping[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {"time": datetime.fromtimestamp(item["_timestamp"], UTC).isoformat()}
    for name, value in item.items():
        if not name.startswith("_") and not name.endswith(_NOT_LIST):
            row[name.removesuffix(_HISTOGRAM)] = _value(value)
    return row


def _value(value: Any) -> Any:
    if isinstance(value, dict):
        return value["values"]
    return _NUMBERS.get(value, value) if isinstance(value, str) else value
