"""Ratios of measured sums, where what is below the line may be zero. Knows nothing."""

from __future__ import annotations

import math


def ratio(part: float, whole: float) -> float | None:
    """Part / whole; 0 where both are 0, None where only `whole` is 0 or where the ratio is not finite."""
    if not whole:
        return None if part else 0.0
    found = part / whole
    return found if math.isfinite(found) else None
