"""The panels as plotly figures: a line per arm with its interval over seeds, heat maps of expert load, differences.

Text and lines take the page's colours, in light and in dark; arms have the palette of `upcycle.analysis.figures`, the
baseline grey. Shapes: S logged steps, R rows of a heat map.
"""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import html
import re
import textwrap
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go

from upcycle.analysis.figures import COLOURS
from upcycle.analysis.statistics import quantile
from upcycle.dashboard.findings import CONFIDENCE, SMALLEST_PERCENT

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import pandas as pd

    from upcycle.dashboard.findings import Finding
    from upcycle.dashboard.panels import Panel

GREY = "#8a8a8a"  # legible on white and on black, where the palette's black is not
GRID = "rgba(138, 138, 138, 0.25)"
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
POINTS = 200  # of a line, and columns of a heat map: more cannot be seen, and would make the page heavy
HEIGHT = 300  # pixels
LINE_HEIGHT = 16  # of text
ROW_HEIGHT, MOST_HEIGHT = 9, 900  # of a heat map
NAME_WIDTH = 46  # characters of a line of an arm's name
FONT = {"family": "system-ui, sans-serif", "size": 12}


@dataclass(frozen=True, kw_only=True)
class Style:
    """How an arm is drawn.

    Attributes:
        index: number of the arm, by which the page shows and hides it.
        colour: of line and band.
        dash: of the line.
    """

    index: int
    colour: str
    dash: str


def styles(arms: Sequence[str], baseline: str) -> dict[str, Style]:
    """A style for each arm; colours and dashes run with different periods, so that no two of 30 look the same."""
    looks = zip(cycle(COLOURS[1:]), cycle(DASHES), strict=False)
    found = {}
    for index, arm in enumerate(arms):
        colour, dash = (GREY, "solid") if arm == baseline else next(looks)
        found[arm] = Style(index=index, colour=colour, dash=dash)
    return found


def draw_lines(rows: pd.DataFrame, panel: Panel, looks: Mapping[str, Style]) -> go.Figure | None:
    """A metric's mean over seeds by arm, with the t interval as a band; None if no run logged it.

    Args:
        rows: from `load_runs`, with a column `arm`.
        panel: of kind `lines`.
        looks: from `styles`.
    """
    if panel.metric not in rows or rows[panel.metric].isna().all():
        return None
    figure = _figure()
    logged = rows[["arm", panel.against, panel.metric]].dropna()
    for arm, style in looks.items():
        if len(found := _over_seeds(logged[logged["arm"] == arm], panel)):
            figure.add_traces(_line(found, arm, style, panel))
    figure.update_xaxes(title=panel.x_title, exponentformat="SI")
    figure.update_yaxes(title=panel.unit)
    return figure


def draw_heat_maps(rows: pd.DataFrame, panel: Panel, arms: Iterable[str]) -> dict[str, go.Figure]:
    """For each arm that logged it, every expert's value over the steps of its first seed, layer under layer.

    Values are relative to their mean over the layer's experts. All maps have the same colours.

    Args:
        rows: from `load_runs`, with a column `arm`.
        panel: of kind `heat map`.
        arms: in their order.
    """
    maps = {arm: found for arm in arms if (found := _first_seed(rows[rows["arm"] == arm], panel))}
    most = max((float(np.nanmax(values_RS)) for _, values_RS, _ in maps.values()), default=1.0)
    return {arm: _heat_map(*found, most=max(2.0, most), panel=panel) for arm, found in maps.items()}


def draw_differences(findings: Sequence[Finding], looks: Mapping[str, Style], *, metric: str) -> go.Figure | None:
    """Every compared arm's difference from the baseline in percent, with its interval; None if there is none."""
    compared = [finding for finding in findings if finding.row]
    if not compared:
        return None
    names = [_wrapped(finding.arm) for finding in compared]
    row_height = 34 + LINE_HEIGHT * (1 + max(name.count("<br>") for name in names))
    figure = _figure(height=80 + row_height * len(compared))
    figure.add_vrect(-SMALLEST_PERCENT, SMALLEST_PERCENT, fillcolor=GREY, opacity=0.18, line_width=0)
    figure.add_vline(0, line={"color": GREY, "width": 1})
    for place, (finding, name) in enumerate(zip(compared, names, strict=True)):
        row, style = finding.row, looks[finding.arm]
        arms = {"array": [row["percent_high"] - row["percent"]], "arrayminus": [row["percent"] - row["percent_low"]]}
        figure.add_scatter(
            x=[row["percent"]],
            y=[place],
            error_x={"type": "data", "symmetric": False, "thickness": 2, "width": 6, **arms},
            mode="markers",
            marker={"size": 10, "color": style.colour},
            hovertemplate=f"{name}<br>%{{x:+.2f}} %<extra></extra>",
        )
        figure.add_annotation(
            x=0,
            xref="paper",
            xanchor="left",
            y=place,
            yshift=10,
            yanchor="bottom",
            text=name,
            align="left",
            showarrow=False,
        )
    figure.update_yaxes(visible=False, range=[len(compared) - 0.7, -0.9])
    figure.update_xaxes(title=f"{metric}, difference from the baseline (%)", zeroline=False)
    return figure


def _over_seeds(rows: pd.DataFrame, panel: Panel) -> pd.DataFrame:
    """Mean and bounds of the t interval at each of at most POINTS places; bounds are NaN for one seed."""
    found = rows.groupby(panel.against)[panel.metric].agg(["mean", "std", "count"])
    found = _thinned(found)
    factors = {count: quantile(count, confidence=CONFIDENCE) for count in found["count"].unique() if count > 1}
    half = found["count"].map(factors) * found["std"] / np.sqrt(found["count"])
    return found.assign(low=found["mean"] - half, high=found["mean"] + half)


def _thinned(frame: pd.DataFrame) -> pd.DataFrame:
    """At most POINTS of the rows, evenly spread, the first and the last among them."""
    return frame.iloc[np.unique(np.linspace(0, len(frame) - 1, min(POINTS, len(frame))).astype(int))]


def _line(found: pd.DataFrame, arm: str, style: Style, panel: Panel) -> list[go.Scatter]:
    """The interval's band, then the mean."""
    band = found[found["low"].notna()]
    common = {"legendgroup": str(style.index), "name": _escaped(arm)}
    outline = go.Scatter(
        x=[*band.index, *band.index[::-1]],
        y=[*band["high"], *band["low"][::-1]],
        fill="toself",
        fillcolor=style.colour,
        opacity=0.18,
        mode="lines",
        line={"width": 0},
        hoverinfo="skip",
        **common,
    )
    mean = go.Scatter(
        x=found.index,
        y=found["mean"],
        meta=[found["mean"].min(), found["mean"].max()],  # what the page fits the axis to, as bands may be far wider
        customdata=found[["low", "high", "count"]].fillna(np.inf),
        mode="lines" if len(found) > 1 else "markers",
        line={"color": style.colour, "dash": style.dash, "width": 2},
        hovertemplate=(
            f"{_wrapped(arm)}<br>%{{x:.4s}} {panel.x_title}<br>%{{y:.5g}} {panel.unit}<br>"
            f"{CONFIDENCE:.0%} interval %{{customdata[0]:.5g}} to %{{customdata[1]:.5g}}, "
            "%{customdata[2]} seeds<extra></extra>"
        ),
        **common,
    )
    return [outline, mean] if len(band) else [mean]


def _first_seed(rows: pd.DataFrame, panel: Panel) -> tuple[Any, Any, list[str]] | None:
    """Steps, values relative to their mean and names of the rows, of the first seed that logged the metric."""
    layers = _layers(rows, panel)
    logged = rows[rows[list(layers.values())].notna().any(axis=1)] if layers else rows[:0]
    if logged.empty:
        return None
    run = logged.sort_values("seed")["run"].iloc[0]
    first = _thinned(logged[logged["run"] == run])
    blocks, labels = [], []
    for layer, name in layers.items():
        if first[name].notna().all():
            values_RS = np.stack([np.asarray(each, dtype=float) for each in first[name]], axis=1)
            mean_S = values_RS.mean(axis=0)
            blocks.append(np.divide(values_RS, mean_S, out=np.zeros_like(values_RS), where=mean_S != 0))
            labels += [f"layer {layer}, expert {expert}" for expert in range(len(values_RS))]
    return first["step"].to_numpy(), np.concatenate(blocks), labels


def _layers(rows: pd.DataFrame, panel: Panel) -> dict[int, str]:
    """Index of a layer -> the name of its column, by index."""
    pattern = re.escape(panel.metric).replace(re.escape("{layer}"), r"(\d+)")
    found = [match for name in rows if (match := re.fullmatch(pattern, str(name)))]
    return dict(sorted((int(match[1]), match[0]) for match in found))


def _heat_map(step_S: Any, values_RS: Any, labels: list[str], *, most: float, panel: Panel) -> go.Figure:
    figure = _figure(height=min(MOST_HEIGHT, 120 + ROW_HEIGHT * max(12, len(labels))))
    figure.add_heatmap(
        x=step_S,
        y=list(range(len(labels))),
        z=np.round(values_RS, 3),
        text=np.broadcast_to(np.array(labels)[:, None], values_RS.shape),
        zmin=0,
        zmax=most,
        colorscale="Cividis",
        colorbar={"thickness": 10, "title": {"text": "× mean", "side": "right"}},
        hovertemplate="%{text}<br>step %{x}<br>%{z:.2f} × the mean load<extra></extra>",
    )
    layers = [label.partition(",")[0] for label in labels]
    first = {layer: layers.index(layer) for layer in dict.fromkeys(layers)}
    middle = [start + (layers.count(layer) - 1) / 2 for layer, start in first.items()]
    for start in list(first.values())[1:]:
        figure.add_hline(start - 0.5, line={"color": "white", "width": 2})
    figure.update_yaxes(tickvals=middle, ticktext=list(first), autorange="reversed", ticks="")
    figure.update_xaxes(title=panel.x_title)
    return figure


def _figure(height: int = HEIGHT) -> go.Figure:
    figure = go.Figure()
    figure.update_layout(
        height=height,
        margin={"l": 8, "r": 8, "t": 8, "b": 8},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        showlegend=False,
        hovermode="closest",
        font=FONT,
    )
    axis = {"automargin": True, "gridcolor": GRID, "linecolor": GREY}
    figure.update_xaxes(showline=True, zeroline=False, **axis)
    figure.update_yaxes(zeroline=False, **axis)
    return figure


def _escaped(text: str) -> str:
    """Text that plotly shows as it is: it reads some HTML."""
    return html.escape(text, quote=False)


def _wrapped(arm: str) -> str:
    return "<br>".join(_escaped(line) for line in textwrap.wrap(arm, NAME_WIDTH))
