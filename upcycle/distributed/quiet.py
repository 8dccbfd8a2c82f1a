"""Silences a logger for a while."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager


def only_warnings(logger: str) -> AbstractContextManager[None]:
    """Without what a logger says that is less than a warning."""
    return _at_least(logging.WARNING, logger)


def only_errors(logger: str) -> AbstractContextManager[None]:
    """Without what a logger says that is less than an error."""
    return _at_least(logging.ERROR, logger)


@contextmanager
def _at_least(level: int, logger: str) -> Iterator[None]:
    found = logging.getLogger(logger)
    before = found.level
    found.setLevel(level)
    try:
        yield
    finally:
        found.setLevel(before)
