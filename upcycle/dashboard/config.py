"""Options of `upcycle report`; the defaults are in `conf/`. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from upcycle.options.config import STRICT

Value = str | bool | float


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """`upcycle report`.

    Attributes:
        runs: directory of a sweep, or another one with runs below it.
        output: the HTML file, replaced if it is there; null is report.html in `runs`.
        name: of the sweep, where the directory holds several.
        arms: option, or several, whose values name the arms; null takes the arms of the sweep.
        baseline: arm that the others are compared with; a list of values for several options. null is the arm called
            baseline, or else the first one.
        metric: of the schema; null is the sweep's, or val/loss without a sweep.
        allow: what arms may not share and are compared nevertheless: data, order, source, budget.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    runs: str
    output: str | None
    name: str | None
    arms: str | list[str] | None
    baseline: Value | list[Value] | None
    metric: str | None
    allow: list[str]
