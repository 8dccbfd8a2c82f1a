"""From the rows of runs to one number per run, by arm and seed; and which arms may be compared."""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from upcycle.errors import RecordError, near_misses
from upcycle.tracking import schema
from upcycle.tracking.status import FINISHED

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

SEED, TOKENS, FLOPS = "seed", "train/tokens", "train/flops"
# What arms must share -> the columns that say so; the budget is apart, because it may be shared in either unit.
SHARED = {"data": "data_hash", "order": "order_hash", "source": "source_hash"}
ALLOWED = (*SHARED, "budget", "status")


def check_allowed(allow: Collection[str]) -> None:
    """Raise RecordError for a name that means nothing."""
    for name in allow:
        if name not in ALLOWED:
            raise RecordError("allow names something unknown", found=name, remedy=near_misses(name, ALLOWED))


def check_finished(runs: pd.DataFrame, allow: Collection[str]) -> None:
    """Raise RecordError for runs that have not finished, unless `allow` names the status."""
    check_allowed(allow)
    status = runs.drop_duplicates("run").set_index("run")["status"].astype(object)
    others = status[status != FINISHED]
    if len(others) and "status" not in allow:
        raise RecordError(
            "runs have not finished",
            found=", ".join(f"{run} ({label(word)})" for run, word in others.items()),
            expected="finished runs, whose last loss is that of their budget",
            remedy=f"leave them out: runs[runs['status'] == '{FINISHED}'], or say that it is meant: allow=['status']",
        )


def check_shared(runs: pd.DataFrame, allow: Collection[str]) -> None:
    """Raise RecordError unless all runs have the same data and source, and those of one seed the same order.

    A run without a source, which started from random weights, is none with another source.
    """
    ends = runs.drop_duplicates("run")
    different = {
        "data": ends[SHARED["data"]].nunique(),
        "order": ends.groupby(SEED)[SHARED["order"]].nunique().max(),
        "source": ends[SHARED["source"]].nunique(),
    }
    refused = [what for what, number in different.items() if number > 1 and what not in allow]
    if refused:
        raise RecordError(
            f"the runs do not share their {' and '.join(refused)}",
            found=", ".join(f"{different[what]} of {SHARED[what]}" for what in refused),
            expected="the same data and dense model, and for runs of one seed the same order",
            remedy=f"leave runs out, or say that it is meant: allow={refused}",
        )


def check_columns(runs: pd.DataFrame, *names: str) -> None:
    """Raise RecordError for a column that is not there."""
    for name in names:
        if name not in runs.columns:
            raise RecordError(f"no run has {name}", found=name, remedy=near_misses(name, runs.columns))


def measured(runs: pd.DataFrame, metric: str, arms: str | Sequence[str]) -> pd.DataFrame:
    """The rows in which a metric was measured, with a column `arm`.

    Args:
        runs: from `load_runs`.
        metric: a column.
        arms: an option's path or another column, or several, whose values name the arm together.

    Raises:
        RecordError: a column is not there; a run never measured the metric.
    """
    paths = [arms] if isinstance(arms, str) else list(arms)
    check_columns(runs, metric, *paths)
    rows = runs[runs[metric].notna()]
    without = sorted(set(runs["run"].unique()) - set(rows["run"].unique()))
    if without:
        raise RecordError(f"runs that never measured {metric}", found=", ".join(without), remedy="leave them out")
    named = [rows[path].astype(object).map(label) for path in paths]
    arm = pd.concat(named, axis=1).agg(", ".join, axis=1) if len(named) > 1 else named[0]
    return rows.assign(arm=arm)


def label(value: Any) -> str:
    """The name of an arm by its option's value; of several options, by a tuple of them."""
    if isinstance(value, str):
        return value
    if isinstance(value, tuple):
        return ", ".join(map(label, value))
    return "null" if pd.isna(value) else str(value).lower() if isinstance(value, bool) else f"{value:.12g}"


def outcomes(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """One row per run: its facts, its arm, and the metric reduced as the schema says, or else its last value.

    `train/tokens` and `train/flops` are those at which the metric was measured last.

    Raises:
        RecordError: two runs have the same arm and seed.
    """
    known = schema.metric(metric)
    by_run = rows.groupby("run", observed=True, sort=False)
    ends = by_run.tail(1).set_index("run").assign(**{metric: by_run[metric].agg(known.reduction if known else "last")})
    doubled = ends[ends.duplicated(["arm", SEED], keep=False)].sort_values(["arm", SEED])
    if len(doubled):
        raise RecordError(
            "several runs have the same arm and seed",
            found=", ".join(map(str, doubled.index)),
            expected="one run for each",
            remedy="name the arms by more options, or leave runs out",
        )
    return ends.reset_index()


def check_arm(ends: pd.DataFrame, arm: str) -> None:
    """Raise RecordError for an arm that no run belongs to."""
    if arm not in set(ends["arm"]):
        raise RecordError("no run belongs to this arm", found=arm, remedy=near_misses(arm, set(ends["arm"])))


def pairs(ends: pd.DataFrame, arm: str, baseline: str) -> pd.DataFrame:
    """The runs of an arm beside those of the baseline, by seed: columns with the suffixes `_arm` and `_baseline`.

    Raises:
        RecordError: they share no seed.
    """
    ours, theirs = ends[ends["arm"] == arm], ends[ends["arm"] == baseline]
    joined = ours.merge(theirs, on=SEED, suffixes=("_arm", "_baseline")).sort_values(SEED)
    if joined.empty:
        seeds = [", ".join(f"{seed:g}" for seed in sorted(side[SEED])) for side in (ours, theirs)]
        raise RecordError(
            "an arm shares no seed with the baseline",
            found=f"{arm}: {seeds[0]}; {baseline}: {seeds[1]}",
            expected="the same seeds in both",
        )
    return joined


def equal_budgets(paired: pd.DataFrame) -> list[str]:
    """In which units all pairs spent the same: closer than half a step of each, to which a budget is rounded."""
    units = {"tokens": (TOKENS, "tokens_per_step"), "FLOPs": (FLOPS, "flops_per_step")}
    equal = []
    for unit, (spent, step) in units.items():
        apart = (paired[f"{spent}_arm"] - paired[f"{spent}_baseline"]).abs()
        if (apart < (paired[f"{step}_arm"] + paired[f"{step}_baseline"]) / 2).all():
            equal.append(unit)
    return equal


def check_comparable(paired: pd.DataFrame, arm: str, baseline: str, allow: Collection[str]) -> list[str]:
    """What an arm and the baseline do not share, of data, order, source and budget.

    Raises:
        RecordError: they do not share something that `allow` does not name.
    """
    differing = {}
    for what, column in SHARED.items():
        ours, theirs = (paired[f"{column}_{side}"].astype(object).map(label) for side in ("arm", "baseline"))
        if (ours != theirs).any():
            differing[what] = f"{column} {ours[ours != theirs].iloc[0]:.12} and {theirs[ours != theirs].iloc[0]:.12}"
    if not equal_budgets(paired):
        first = paired.iloc[0]
        units = [f"{first[f'{name}_arm']:.6g} and {first[f'{name}_baseline']:.6g} {name}" for name in (TOKENS, FLOPS)]
        differing["budget"] = "; ".join(units)
    refused = sorted(differing.keys() - set(allow))
    if refused:
        raise RecordError(
            f"{arm} and {baseline} cannot be compared: their {' and '.join(refused)} differ",
            found="; ".join(differing[what] for what in refused),
            expected="the same data in the same order, the same source, and as many tokens or as many FLOPs",
            remedy=f"compare other runs, or say that it is meant: allow={refused}",
        )
    return sorted(differing)
