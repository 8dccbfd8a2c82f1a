"""Figures: frame in, matplotlib Figure out; with intervals, units, and colours that the colour-blind tell apart.

Arms differ in marker and line too, so that a figure survives a grey print.
"""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import math
from itertools import cycle
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from upcycle.analysis.outcomes import FLOPS, check_columns, measured
from upcycle.analysis.statistics import t_estimate
from upcycle.tracking import schema

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import pandas as pd
    from matplotlib.axes import Axes

# Okabe and Ito, Color Universal Design (2008), black first and without yellow, which is faint on white.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":")
SIZE = (7.0, 4.5)  # inches


def draw_curves(
    runs: pd.DataFrame,
    *,
    arms: str | Sequence[str],
    metric: str = "val/loss",
    against: str = FLOPS,
    confidence: float = 0.95,
) -> Figure:
    """A metric's mean over seeds by arm, with the t interval as a band; one seed has no band.

    Args:
        runs: from `load_runs`.
        arms: an option's path or another column, or several, whose values name the arm together.
        metric: a column.
        against: train/flops, train/tokens or step.
        confidence: of the interval.

    Raises:
        RecordError: a column or the metric is missing.
    """
    check_columns(runs, against)
    rows = measured(runs, metric, arms)
    figure, axes = _figure()
    for (arm, group), style in zip(rows.groupby("arm"), _styles(), strict=False):
        at = [(x, t_estimate(values, confidence=confidence)) for x, values in group.groupby(against)[metric]]
        x = [each for each, _ in at]
        axes.plot(x, [found.mean for _, found in at], label=arm, markersize=4, **style)
        axes.fill_between(
            x, [found.low for _, found in at], [found.high for _, found in at], color=style["color"], alpha=0.15, lw=0
        )
    axes.set_xlabel(_axis(against))
    axes.set_ylabel(_axis(metric))
    axes.set_title(f"mean over seeds, {confidence:.0%} t interval", fontsize="medium")
    _legend(axes)
    return figure


def draw_comparison(compared: pd.DataFrame, *, metric: str = "val/loss", smallest_percent: float = 1.0) -> Figure:
    """Every arm's difference from the baseline in percent, with its paired t interval, and the verdict.

    Args:
        compared: from `compare`.
        metric: the one that was compared.
        smallest_percent: the smallest effect of interest, drawn as a band around 0.
    """
    figure, axes = _figure(height=1.2 + 0.45 * max(1, len(compared)))
    axes.axvspan(-smallest_percent, smallest_percent, color="0.92", zorder=0)
    axes.axvline(0, color="0.4", linewidth=1, zorder=1)
    colours = {"lower": COLOURS[1], "higher": COLOURS[2]}
    for row, found in enumerate(compared.itertuples()):
        style: dict[str, Any] = {"fmt": MARKERS[0], "color": colours.get(found.verdict, "0.35"), "capsize": 3}
        half = [[found.percent - found.percent_low], [found.percent_high - found.percent]]
        axes.errorbar(found.percent, row, xerr=half, **style)
    names = [f"{each.arm}\nn = {each.pairs}, {each.verdict}" for each in compared.itertuples()]
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(max(1, len(names)) - 0.5, -0.5)
    axes.set_xlabel(f"{metric}, difference from the baseline (%)\nband: ±{smallest_percent:g} %")
    return figure


def draw_frontier(points: pd.DataFrame, *, metric: str = "val/loss", with_sunk: bool = False) -> Figure:
    """Loss against FLOPs by arm with intervals over seeds; the Pareto set is underlaid.

    Args:
        points: from `frontier`.
        metric: the one that it was made for.
        with_sunk: charge what the dense model cost.
    """
    cost, best = ("flops_with_sunk", "pareto_with_sunk") if with_sunk else ("flops", "pareto")
    figure, axes = _figure()
    for (arm, group), style in zip(points.groupby("arm"), _styles(), strict=False):
        errors = [group["loss"] - group["low"], group["high"] - group["loss"]]
        axes.errorbar(group[cost], group["loss"], yerr=errors, label=arm, markersize=4, capsize=2, **style)
    front = points[points[best]].sort_values(cost)
    axes.plot(front[cost], front["loss"], color="0.6", lw=4, alpha=0.5, zorder=0, label="Pareto set")
    axes.set_xlabel(_axis(FLOPS) + (", with the dense model's" if with_sunk else ""))
    axes.set_ylabel(_axis(metric))
    _legend(axes)
    return figure


def draw_shares(tables: Mapping[str, pd.DataFrame], *, columns: int) -> Figure:
    """Heat maps of which share of each label's tokens each expert takes, all on one scale.

    Args:
        tables: title -> from `upcycle.analysis.specialisation.shares`.
        columns: heat maps beside each other.
    """
    rows = math.ceil(len(tables) / columns)
    figure = Figure(figsize=(3.2 * columns + 1, 3.4 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    highest = 100 * max(float(table.to_numpy().max()) for table in tables.values())
    for axes, (title, table) in zip(grid, tables.items(), strict=False):
        image = axes.imshow(100 * table, cmap="cividis", vmin=0, vmax=highest, aspect="auto")
        axes.set_title(title, fontsize="medium")
        axes.set_xticks(range(table.shape[1]), table.columns, rotation=60, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(table)), table.index)
    for axes in grid[::columns]:
        axes.set_ylabel("expert")
    for axes in grid[len(tables) :]:
        axes.set_visible(False)
    figure.colorbar(image, ax=list(grid), label="share of the tokens of a column (%)")
    return figure


def draw_explained(found: pd.DataFrame, *, of: str, confidence: float = 0.95) -> Figure:
    """How much of a label an expert's index tells, by arm and layer: mean over seeds with its t interval.

    Args:
        found: `arm`, `seed`, `layer`, `explained`.
        of: what the labels are.
        confidence: of the interval.
    """
    figure, axes = _figure()
    arms = found.groupby("arm", sort=False)
    for place, ((arm, group), style) in enumerate(zip(arms, _styles(), strict=False)):
        layers = group.groupby("layer")["explained"]
        found_L = [t_estimate(100 * values, confidence=confidence) for _, values in layers]
        at = [layer + 0.15 * (place - (len(arms) - 1) / 2) for layer in layers.groups]
        errors = [[each.mean - each.low for each in found_L], [each.high - each.mean for each in found_L]]
        means = [each.mean for each in found_L]
        axes.errorbar(at, means, yerr=errors, label=arm, capsize=3, **style | {"linestyle": "none"})
    axes.set_xticks(sorted(found["layer"].unique()))
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    axes.set_xlabel("layer")
    axes.set_ylabel(f"entropy of the {of} that the expert tells,\nchance subtracted (%)")
    axes.set_title(f"mean over seeds, {confidence:.0%} t interval", fontsize="medium")
    axes.legend()
    return figure


def _figure(height: float = SIZE[1]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(SIZE[0], height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(visible=True, alpha=0.3)
    return figure, axes


def _legend(axes: Axes) -> None:
    """A legend, or the word that there is nothing to draw."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    else:
        axes.text(0.5, 0.5, "no runs have finished", transform=axes.transAxes, ha="center", color="0.4")


def _styles() -> Iterable[dict[str, Any]]:
    """Endless: colour, marker and line run with different periods, so that no two of 56 arms look the same."""
    for colour, marker, line in zip(cycle(COLOURS), cycle(MARKERS), cycle(LINES), strict=False):
        yield {"color": colour, "marker": marker, "linestyle": line}


def _axis(name: str) -> str:
    """A metric's name with its unit, from the schema."""
    known = schema.metric(name)
    return f"{name} ({known.unit})" if known and known.unit != "1" else name
