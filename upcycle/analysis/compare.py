"""`compare` and `gap_closure`: what an arm changes, with its uncertainty, over pairs of runs that share a seed."""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from upcycle.analysis.outcomes import (
    SEED,
    check_arm,
    check_comparable,
    check_finished,
    equal_budgets,
    label,
    measured,
    outcomes,
    pairs,
)
from upcycle.analysis.statistics import fieller, holm, t_estimate
from upcycle.errors import RecordError

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence


def compare(
    runs: pd.DataFrame,
    *,
    arms: str | Sequence[str],
    baseline: Any,
    metric: str = "val/loss",
    smallest_percent: float = 1.0,
    confidence: float = 0.95,
    allow: Collection[str] = (),
) -> pd.DataFrame:
    """Compare every arm with the baseline, pairing runs by seed.

    Columns: `arm`; `pairs`, seeds in both; `unpaired`, seeds in one alone, which do not count; means `baseline` and
    `value`, and their `difference` with bounds `low` and `high` of the paired t interval, in the metric's unit;
    `percent` of the baseline's value, pair by pair, with `percent_low` and `percent_high` (empty where a baseline's
    value is 0 and its arm's is not); `p` of the paired t test on the differences, two-sided, and `p_holm`, adjusted
    over the arms; `equal`, in which units the budgets are; `differs`, what was allowed to differ and does; and a
    `verdict`:

    - `lower` or `higher`: p_holm is below 1 - confidence;
    - else `same`: the interval lies within ± smallest_percent;
    - else `underpowered`: neither can be said of so few pairs.

    Args:
        runs: from `load_runs`.
        arms: an option's path or another column, or several, whose values name the arm together.
        baseline: the value of `arms` to compare with; a tuple for several.
        metric: a metric of the schema, reduced to one number per run as the schema says.
        smallest_percent: the smallest effect of interest, in percent of the baseline.
        confidence: of intervals and verdicts.
        allow: what arms may not share: data, order, source, budget. A budget is shared with the same tokens or the
            same FLOPs, closer than half an optimizer step of each. With status, runs count that have not finished.

    Returns:
        One row per arm, by name.

    Raises:
        RecordError: a column, the metric, the baseline or a shared seed is missing; two runs have the same arm and
            seed; a run has not finished, or arms do not share what `allow` does not name.
    """
    check_finished(runs, allow)
    ends, reference = outcomes(measured(runs, metric, arms), metric), label(baseline)
    check_arm(ends, reference)
    others = sorted(set(ends["arm"]) - {reference})
    rows = [_row(ends, arm, reference, metric, confidence, allow) for arm in others]
    compared = pd.DataFrame(rows, columns=COLUMNS)
    compared["p_holm"] = holm(compared["p"])
    compared["verdict"] = [_verdict(row, smallest_percent, confidence) for row in compared.itertuples()]
    return compared


COLUMNS = [
    *("arm", "pairs", "unpaired", "baseline", "value", "difference", "low", "high"),
    *("percent", "percent_low", "percent_high", "p", "p_holm", "equal", "differs", "verdict"),
]


def _row(
    ends: pd.DataFrame, arm: str, baseline: str, metric: str, confidence: float, allow: Collection[str]
) -> dict[str, Any]:
    paired = pairs(ends, arm, baseline)
    differs = check_comparable(paired, arm, baseline, allow)
    ours, theirs = paired[f"{metric}_arm"], paired[f"{metric}_baseline"]
    absolute = t_estimate(ours - theirs, confidence=confidence)
    percent = t_estimate(_percent(ours, theirs), confidence=confidence)
    return {
        "arm": arm,
        "pairs": len(paired),
        "unpaired": int(ends["arm"].isin([arm, baseline]).sum()) - 2 * len(paired),
        "baseline": float(theirs.mean()),
        "value": float(ours.mean()),
        "difference": absolute.mean,
        "low": absolute.low,
        "high": absolute.high,
        "percent": percent.mean,
        "percent_low": percent.low,
        "percent_high": percent.high,
        "p": absolute.p,
        "equal": ", ".join(equal_budgets(paired)),
        "differs": ", ".join(differs),
    }


def _percent(ours: pd.Series, theirs: pd.Series) -> pd.Series:
    """Difference in percent of the baseline, pair by pair: 0 where both are 0, NaN where the baseline alone is."""
    difference = ours - theirs
    return (100 * difference / theirs.where(theirs != 0)).mask(difference == 0, 0.0)


def _verdict(row: Any, smallest_percent: float, confidence: float) -> str:
    if row.p_holm < 1 - confidence:
        return "lower" if row.difference < 0 else "higher"
    within = -smallest_percent < row.percent_low and row.percent_high < smallest_percent
    return "same" if within else "underpowered"


def gap_closure(
    runs: pd.DataFrame,
    *,
    arms: str | Sequence[str],
    baseline: Any,
    reference: Any,
    metric: str = "val/loss",
    confidence: float = 0.95,
    allow: Collection[str] = (),
) -> pd.DataFrame:
    """Which share of the gap between a baseline and a reference each arm closes.

    closure = (baseline - arm) / (baseline - reference), of the means over the seeds that all three share: 0 for an arm
    as good as the baseline, 1 for one as good as the reference. Its interval is Fieller's, unbounded where the gap
    itself cannot be told from 0.

    Args:
        runs: from `load_runs`.
        arms: as for `compare`.
        baseline: the value of `arms` where the gap begins, such as continued dense training.
        reference: the value of `arms` where it ends, such as a MoE trained from scratch or for longer.
        metric: as for `compare`.
        confidence: of the interval.
        allow: what the arms may not share, as for `compare`.

    Returns:
        One row per arm: `arm`, `pairs`, `closure`, `low`, `high`.

    Raises:
        RecordError: as for `compare`.
    """
    check_finished(runs, allow)
    ends = outcomes(measured(runs, metric, arms), metric)
    start, end = label(baseline), label(reference)
    for arm in (start, end):
        check_arm(ends, arm)
    rows = []
    for arm in sorted(set(ends["arm"]) - {start, end}):
        gaps = {each: _gains(ends, each, start, metric, allow) for each in (arm, end)}
        both = pd.concat(gaps, axis=1, join="inner")
        if both.empty:
            raise RecordError(
                "three arms share no seed", found=f"{arm}, {start}, {end}", expected="the same seeds in all"
            )
        closure, low, high = fieller(both[arm], both[end], confidence=confidence)
        rows.append({"arm": arm, "pairs": len(both), "closure": closure, "low": low, "high": high})
    return pd.DataFrame(rows, columns=["arm", "pairs", "closure", "low", "high"])


def _gains(ends: pd.DataFrame, arm: str, baseline: str, metric: str, allow: Collection[str]) -> pd.Series:
    """Baseline minus arm, by seed."""
    paired = pairs(ends, arm, baseline)
    check_comparable(paired, arm, baseline, allow)
    return paired.set_index(SEED)[f"{metric}_baseline"] - paired.set_index(SEED)[f"{metric}_arm"]
