"""The error a user sees: what was wrong, what was found, what was expected, what to do. Knows no other room."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class UpcycleError(ValueError):
    """A user's mistake or a bad input; the command line prints it without a traceback and exits with 1.

    Args:
        what: what was wrong, one sentence.
        found: the offending value.
        expected: what would have been right.
        remedy: what to do about it.
    """

    def __init__(
        self,
        what: str,
        *,
        found: object = None,
        expected: object = None,
        remedy: str | None = None,
    ) -> None:
        self.what = what
        parts = [("found", found), ("expected", expected), ("remedy", remedy)]
        lines = [f"  {label + ':':<10}{value}" for label, value in parts if value is not None]
        super().__init__("\n".join([what, *lines]))


class ConfigError(UpcycleError):
    """An option, or a combination of options, that cannot work."""


class SourceError(UpcycleError):
    """The dense checkpoint cannot be read, or is not what it should be."""


class TargetError(UpcycleError):
    """The MoE architecture asked for cannot express the request."""


class OutputError(UpcycleError):
    """The output directory cannot be written."""


class TrainingError(UpcycleError):
    """Training cannot go on."""


class MissingPackageError(UpcycleError, ImportError):
    """What was asked for needs a package that is not installed."""


class RecordError(UpcycleError):
    """The records of runs cannot be read, or do not answer the question."""


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """Return 'did you mean …?' for a `name` close to some of `known`, else None."""
    close = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else None


def near_misses(name: str, known: Iterable[str]) -> str:
    """Return 'did you mean …?' for `name` among `known`, or the list of all that is known."""
    known = sorted(known)
    return did_you_mean(name, known) or f"known: {', '.join(known)}"


def listed(names: Sequence[object], *, shown: int = 5) -> str:
    """The first names, and how many more there are, such as "a, b and 3 more"."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(map(str, names[:shown])) + more


def nearest(value: int, valid: Sequence[int]) -> str:
    """The neighbours of a number among sorted ones, such as "4 or 6"."""
    below = [v for v in valid if v < value][-1:]
    above = [v for v in valid if v > value][:1]
    return " or ".join(map(str, [*below, *above]))
