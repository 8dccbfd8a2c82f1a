"""Loss against training FLOPs: the frontier of arms, and what it costs to reach the baseline's loss.

FLOPs are an arm's own, or with sunk cost: an arm that started from trained weights is also charged what they cost.
Points within a run belong to an unfinished schedule, at a loss that a shorter schedule would have brought lower; so
savings read from them are cautious, and claims about budgets need runs of several budgets.
"""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from upcycle.analysis.outcomes import (
    FLOPS,
    check_arm,
    check_comparable,
    check_finished,
    check_shared,
    label,
    measured,
    outcomes,
    pairs,
)
from upcycle.analysis.statistics import t_estimate

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from numpy.typing import ArrayLike, NDArray

WITH_SUNK = "flops_with_sunk"
SAVING_COLUMNS = [
    *("arm", "pairs", "reached", "percent", "low", "high"),
    *("percent_with_sunk", "low_with_sunk", "high_with_sunk"),
]


def frontier(
    runs: pd.DataFrame,
    *,
    arms: str | Sequence[str],
    sunk_flops: float = 0.0,
    metric: str = "val/loss",
    confidence: float = 0.95,
    allow: Collection[str] = (),
) -> pd.DataFrame:
    """Mean loss over seeds at every FLOPs at which it was measured, and which points nothing cheaper beats.

    Args:
        runs: from `load_runs`.
        arms: an option's path or another column, or several, whose values name the arm together.
        sunk_flops: training FLOPs of the dense model, charged to arms that started from it.
        metric: a metric of which less is better.
        confidence: of the t interval over seeds.
        allow: what runs may not share: data, order (of one seed), source (of those that have one). With status, runs
            count that have not finished.

    Returns:
        One row per arm and FLOPs: `arm`, `flops`, `flops_with_sunk`, `seeds`, `loss`, `low`, `high`, and whether the
        point is in the Pareto set of all arms' mean losses: `pareto`, `pareto_with_sunk`.

    Raises:
        RecordError: a column or the metric is missing; a run has not finished, or runs do not share what `allow` does
            not name.
    """
    check_finished(runs, allow)
    check_shared(runs, allow)
    rows = _charged(measured(runs, metric, arms), sunk_flops)
    points = []
    for (arm, flops), group in rows.groupby(["arm", FLOPS]):
        loss = t_estimate(group[metric], confidence=confidence)
        costs = {"flops": flops, WITH_SUNK: group[WITH_SUNK].iloc[0]}
        costs["flops_per_step"] = group["flops_per_step"].iloc[0]
        points.append({"arm": arm, **costs, "seeds": len(group), "loss": loss.mean, "low": loss.low, "high": loss.high})
    table = pd.DataFrame(points, columns=["arm", "flops", WITH_SUNK, "flops_per_step", "seeds", "loss", "low", "high"])
    step_P = table.pop("flops_per_step")
    table["pareto"] = pareto(table["flops"], table["loss"], step_P)
    table["pareto_with_sunk"] = pareto(table[WITH_SUNK], table["loss"], step_P)
    return table


def pareto(cost_P: ArrayLike, loss_P: ArrayLike, step_P: ArrayLike = 0.0) -> NDArray[np.bool_]:
    """Which of P points have a lower loss than every point that costs no more; of equal points, the first.

    Costs less than `step_P` above a point's own are its own: a budget is rounded to whole steps.
    """
    cost, loss = np.asarray(cost_P, dtype=float), np.asarray(loss_P, dtype=float)
    order = np.lexsort((loss, cost))
    cost, loss, step = cost[order], loss[order], np.broadcast_to(step_P, cost.shape)[order]
    lowest = np.minimum.accumulate(loss)
    before = np.concatenate([[np.inf], lowest[:-1]])
    rivals = np.maximum(np.searchsorted(cost, cost, "right"), np.searchsorted(cost, cost + step, "left"))
    best = np.empty(len(order), dtype=bool)
    best[order] = (loss < before) & (loss <= lowest[rivals - 1])
    return best


def iso_loss_saving(
    runs: pd.DataFrame,
    *,
    arms: str | Sequence[str],
    baseline: Any,
    sunk_flops: float = 0.0,
    metric: str = "val/loss",
    confidence: float = 0.95,
    allow: Collection[str] = (),
) -> pd.DataFrame:
    """How many FLOPs an arm saves, in percent, on the way to the loss at which the baseline ends; pairs share a seed.

    saving = 100 * (1 - FLOPs of the arm / FLOPs of the baseline), each up to where its curve, straight between
    measurements, first is as low as the baseline's last loss. The budget need not be shared.

    Args:
        runs: from `load_runs`.
        arms: as for `compare`.
        baseline: the value of `arms` to save against.
        sunk_flops: training FLOPs of the dense model, charged to arms that started from it.
        metric: a metric of which less is better.
        confidence: of the interval.
        allow: what the arms may not share besides the budget, as for `compare`.

    Returns:
        One row per arm: `arm`, `pairs`, `reached` (pairs in which the arm got as low), and the mean `percent` with its
        t interval `low`, `high`, and the same `_with_sunk`; NaN unless all pairs reached it.

    Raises:
        RecordError: as for `compare`.
    """
    check_finished(runs, allow)
    rows = _charged(measured(runs, metric, arms), sunk_flops)
    ends, reference = outcomes(rows, metric), label(baseline)
    check_arm(ends, reference)
    table = []
    for arm in sorted(set(ends["arm"]) - {reference}):
        paired = pairs(ends, arm, reference)
        check_comparable(paired, arm, reference, {*allow, "budget"})
        savings_B2 = np.array([_saving(rows, pair, metric) for pair in paired.to_dict("records")])
        reached = int(np.isfinite(savings_B2[:, 0]).sum())
        entry = {"arm": arm, "pairs": len(paired), "reached": reached}
        for suffix, values_B in zip(("", "_with_sunk"), savings_B2.T, strict=True):
            saved = t_estimate(values_B, confidence=confidence)
            entry |= {f"percent{suffix}": saved.mean, f"low{suffix}": saved.low, f"high{suffix}": saved.high}
        table.append(entry)
    return pd.DataFrame(table, columns=SAVING_COLUMNS)


def _charged(rows: pd.DataFrame, sunk_flops: float) -> pd.DataFrame:
    return rows.assign(**{WITH_SUNK: rows[FLOPS] + sunk_flops * rows["source_hash"].notna()})


def _saving(rows: pd.DataFrame, pair: dict[str, Any], metric: str) -> list[float]:
    """Percent saved in one pair, without and with sunk cost."""
    curves = [rows[rows["run"] == pair[f"run_{side}"]] for side in ("arm", "baseline")]
    target = curves[1][metric].iloc[-1]
    savings = []
    for cost in (FLOPS, WITH_SUNK):
        ours, theirs = (reaching(curve[cost], curve[metric], target) for curve in curves)
        savings.append(100 * (1 - ours / theirs) if theirs else math.nan)
    return savings


def reaching(cost_P: ArrayLike, loss_P: ArrayLike, target: float) -> float:
    """Cost at which a curve, straight between its P points, first is at or below a loss; NaN where it never is."""
    cost, loss = np.asarray(cost_P, dtype=float), np.asarray(loss_P, dtype=float)
    below = np.flatnonzero(loss <= target)
    if not len(below):
        return math.nan
    last = below[0]
    if last == 0:
        return float(cost[0])
    share = (loss[last - 1] - target) / (loss[last - 1] - loss[last])
    return float(cost[last - 1] + share * (cost[last] - cost[last - 1]))
