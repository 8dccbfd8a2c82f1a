"""What the runs of a report say: a comparison of those arms that can be compared, and why others cannot."""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from upcycle.analysis.compare import compare
from upcycle.analysis.outcomes import check_allowed, check_columns, label
from upcycle.errors import RecordError, near_misses
from upcycle.tracking.status import FINISHED

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    import pandas as pd

BASELINE = "baseline"
SMALLEST_PERCENT, CONFIDENCE = 1.0, 0.95
_SAYS = {
    "lower": "ends lower than",
    "higher": "ends higher than",
    "same": f"ends within ±{SMALLEST_PERCENT:g} % of",
    "underpowered": "cannot be told apart from",
}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What was found about an arm.

    Attributes:
        arm: the arm.
        says: a few words about it, that end where the name of the baseline follows; None if it was not compared.
        row: of `compare`; empty if it was not compared.
        refused: why it was not compared.
    """

    arm: str
    says: str | None
    row: Mapping[str, Any]
    refused: str | None


def choose_baseline(arms: Sequence[str], given: Any) -> str:
    """The arm that the others are compared with.

    Raises:
        RecordError: there is no such arm.
    """
    if given is None:
        return BASELINE if BASELINE in arms else arms[0]
    name = label(tuple(given) if isinstance(given, list) else given)
    if name not in arms:
        raise RecordError("no run belongs to this arm", found=name, remedy=near_misses(name, arms))
    return name


def find(
    rows: pd.DataFrame, arms: Sequence[str], *, baseline: str, metric: str, allow: Collection[str]
) -> tuple[Finding, ...]:
    """Compare every arm with the baseline, over finished runs alone.

    Arms that may not be compared say so instead of keeping the others from it; p values are adjusted over the rest.

    Args:
        rows: from `load_runs`, with a column `arm`.
        arms: all arms, in their order.
        baseline: one of them.
        metric: a column.
        allow: as for `compare`.

    Raises:
        RecordError: no run has the metric, or `allow` names something else.
    """
    check_columns(rows, metric)
    check_allowed(allow)
    with_metric = rows[rows[metric].notna()]["run"].unique()
    usable = rows[(rows["status"] == FINISHED) & rows["run"].isin(with_metric)]
    others = [arm for arm in arms if arm != baseline]
    options: dict[str, Any] = {
        "arms": "arm",
        "baseline": baseline,
        "metric": metric,
        "allow": allow,
        "smallest_percent": SMALLEST_PERCENT,
        "confidence": CONFIDENCE,
    }
    refused = {arm: why for arm in others if (why := _refusal(usable, arm, options))}
    compared = [arm for arm in others if arm not in refused]
    together = compare(_only(usable, *compared, baseline), **options).to_dict("records") if compared else []
    found = {row["arm"]: row for row in together}
    return tuple(
        Finding(
            arm=arm,
            says=_SAYS[found[arm]["verdict"]] if arm in found else None,
            row=found.get(arm, {}),
            refused=refused.get(arm),
        )
        for arm in others
    )


def _refusal(usable: pd.DataFrame, arm: str, options: Mapping[str, Any]) -> str | None:
    """Why an arm cannot be compared with the baseline; None if it can."""
    for name in (options["baseline"], arm):
        if name not in set(usable["arm"]):
            return f"no finished run of {name} has measured {options['metric']}"
    try:
        compare(_only(usable, arm, options["baseline"]), **options)
    except RecordError as error:
        return str(error)
    return None


def _only(rows: pd.DataFrame, *arms: str) -> pd.DataFrame:
    return rows[rows["arm"].isin(arms)]
