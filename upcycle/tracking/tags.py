"""Which run of a sweep a run is, among the tags that its record and its W&B run have. Knows nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

SWEEP, ARM = "sweep:", "arm:"


def sweep_tags(sweep: str, arm: str) -> list[str]:
    """The tags of the runs of an arm."""
    return [SWEEP + sweep, ARM + arm]


def arm_of(tags: Sequence[str]) -> str | None:
    """The arm that tags name; None for a run of no sweep."""
    return next((tag.removeprefix(ARM) for tag in reversed(tags) if tag.startswith(ARM)), None)
