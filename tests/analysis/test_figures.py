"""Figures hold what their frames hold: every arm, its interval, units on the axes; and can be told apart in grey."""

from __future__ import annotations

import itertools
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgb
from scipy import stats
from written import write_arms

from upcycle.analysis import compare, draw_comparison, draw_curves, draw_frontier, frontier, load_runs
from upcycle.analysis.figures import COLOURS, draw_explained, draw_shares
from upcycle.errors import RecordError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.figure import Figure
    from numpy.typing import NDArray

# Linear sRGB to XYZ (IEC 61966-2-1), and to what eyes see of it without one kind of cones (Machado et al. 2009).
SRGB = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
SEEN = {
    "all cones": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "no long cones": (
        (0.152286, 1.052583, -0.204868),
        (0.114503, 0.786281, 0.099216),
        (-0.00388, -0.048116, 1.051998),
    ),
    "no medium cones": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.01182, 0.04294, 0.968881)),
    "no short cones": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.3039)),
}
ENDS = {"exact": [3.0, 3.1, 2.9], "none": [3.3, 3.2, 3.22], "paper": [2.8, 2.95, 2.71]}


@pytest.fixture
def runs(tmp_path: Path) -> pd.DataFrame:
    return load_runs(write_arms(tmp_path, ENDS))


def saved(figure: Figure) -> bytes:
    stream = BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()


def test_curves(runs: pd.DataFrame) -> None:
    figure = draw_curves(runs, arms="init.scaling")
    (axes,) = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("train/flops (FLOP)", "val/loss (nats/token)")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(ENDS)
    for line, ends in zip(axes.lines, ENDS.values(), strict=True):
        assert line.get_xdata().tolist() == [0, 1000, 2000]
        assert line.get_ydata()[-1] == pytest.approx(np.mean(ends))
    bands = [each for each in axes.collections if isinstance(each, PolyCollection)]
    points = frontier(runs, arms="init.scaling").groupby("arm")[["low", "high"]]
    for band, (low, high) in zip(bands, zip(points.min()["low"], points.max()["high"], strict=True), strict=True):
        heights = band.get_paths()[0].vertices[:, 1]
        assert (heights.min(), heights.max()) == pytest.approx((low, high))
    assert saved(figure)


def test_curves_against_tokens_and_of_a_metric_without_unit(runs: pd.DataFrame) -> None:
    frame = runs.assign(**{"moe/max_vio": 0.5})
    (axes,) = draw_curves(frame, arms="init.scaling", metric="moe/max_vio", against="train/tokens").axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("train/tokens (tokens)", "moe/max_vio")
    with pytest.raises(RecordError, match="did you mean train/tokens"):
        draw_curves(frame, arms="init.scaling", against="tokens")


def test_arms_differ_in_colour_marker_and_line(runs: pd.DataFrame) -> None:
    (axes,) = draw_curves(runs, arms="init.scaling").axes
    for of in ("get_color", "get_marker", "get_linestyle"):
        assert len({getattr(line, of)() for line in axes.lines}) == len(ENDS)


def lab(colour: str, seen: Sequence[Sequence[float]] = SEEN["all cones"]) -> NDArray[np.float64]:
    """CIE L*a*b* of a colour on the screen, as seen by an eye."""
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in to_rgb(colour)]
    relative = SRGB @ np.clip(np.array(seen) @ linear, 0, 1) / (SRGB @ np.ones(3))
    x, y, z = np.where(relative > 0.008856, np.cbrt(relative), 7.787 * relative + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def nearest(colours: Sequence[str], seen: Sequence[Sequence[float]]) -> float:
    """The smallest distance between two of them."""
    return min(float(np.linalg.norm(lab(a, seen) - lab(b, seen))) for a, b in itertools.combinations(colours, 2))


def test_colours_stand_out_from_white() -> None:
    """Every colour is at least 25 of 100 darker than the page; yellow, which was left out, is not."""
    assert max(lab(colour)[0] for colour in COLOURS) < 75
    assert lab("#F0E442")[0] > 75


@pytest.mark.parametrize("eye", SEEN)
def test_colours_differ_for_every_eye(eye: str) -> None:
    """By 15, which is several times what is just noticed. Red and green of matplotlib's own cycle do not."""
    assert nearest(COLOURS, SEEN[eye]) > 15
    if eye == "no medium cones":
        assert nearest(["#d62728", "#2ca02c"], SEEN[eye]) < 15


@pytest.mark.parametrize("seeds", [1, 3])
def test_a_comparison(runs: pd.DataFrame, seeds: int) -> None:
    compared = compare(runs[runs["seed"] < seeds], arms="init.scaling", baseline="exact")
    figure = draw_comparison(compared)
    (axes,) = figure.axes
    labels = [text.get_text() for text in axes.get_yticklabels()]
    verdict = {1: "underpowered", 3: "lower"}[seeds]
    assert labels[1] == f"paper\nn = {seeds}, {verdict}"
    assert "difference from the baseline (%)" in axes.get_xlabel()
    assert len(axes.containers) == len(compared)
    if seeds == 3:
        for drawn, row in zip(axes.containers, compared.itertuples(), strict=True):
            ends = drawn.lines[2][0].get_segments()[0][:, 0]
            assert sorted(ends) == pytest.approx([row.percent_low, row.percent_high])
    assert saved(figure)


@pytest.mark.parametrize("with_sunk", [False, True])
def test_a_frontier(runs: pd.DataFrame, with_sunk: bool) -> None:
    points = frontier(runs, arms="init.scaling", sunk_flops=5000.0)
    figure = draw_frontier(points, with_sunk=with_sunk)
    (axes,) = figure.axes
    assert axes.get_xlabel() == "train/flops (FLOP)" + (", with the dense model's" if with_sunk else "")
    assert axes.get_ylabel() == "val/loss (nats/token)"
    front = next(line for line in axes.lines if line.get_label() == "Pareto set")
    offset = 5000 if with_sunk else 0
    assert front.get_xdata().tolist() == [offset, 1000 + offset, 2000 + offset]
    assert front.get_ydata()[-1] == pytest.approx(np.mean(ENDS["paper"]))
    assert saved(figure)


def test_heat_maps_of_shares() -> None:
    """One scale for all, so that colours can be compared; labels once."""
    tables = {
        f"layer {layer}": pd.DataFrame({"space": [0.9, 0.1], "word start": [0.5, 0.5 - 0.1 * layer]})
        for layer in range(3)
    }
    figure = draw_shares(tables, columns=2)
    maps, colorbar = figure.axes[:4], figure.axes[-1]
    assert [axes.get_title() for axes in maps[:3]] == list(tables)
    assert [axes.get_visible() for axes in maps] == [True, True, True, False]
    for axes, table in zip(maps, tables.values(), strict=False):
        (image,) = axes.images
        np.testing.assert_allclose(image.get_array(), 100 * table)
        assert image.get_clim() == (0, 90)
    assert [text.get_text() for text in maps[2].get_xticklabels()] == ["space", "word start"]
    assert "%" in colorbar.get_ylabel()
    assert saved(figure)


@pytest.mark.parametrize("seeds", [1, 3])
def test_what_is_explained(seeds: int) -> None:
    rows = [
        {"arm": arm, "seed": seed, "layer": layer, "explained": 0.1 + 0.2 * (arm == "trained") + 0.01 * seed * layer}
        for arm in ("step 0", "trained")
        for seed in range(seeds)
        for layer in (0, 1)
    ]
    figure = draw_explained(pd.DataFrame(rows), of="domain")
    (axes,) = figure.axes
    assert "domain" in axes.get_ylabel()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["step 0", "trained"]
    points, _, (bars,) = axes.containers[1].lines
    assert points.get_ydata() == pytest.approx([30, 30 + (seeds - 1) / 2])
    if seeds > 1:
        low, high = bars.get_segments()[1][:, 1]
        interval = stats.ttest_1samp([30, 31, 32], 0).confidence_interval(0.95)
        assert (low, high) == pytest.approx((interval.low, interval.high))
    assert saved(figure)


def test_nothing_to_draw_is_said(runs: pd.DataFrame) -> None:
    """No legend, no warning about one, and a word."""
    (axes,) = draw_curves(runs[:0], arms="init.scaling").axes
    assert axes.get_legend() is None
    assert [text.get_text() for text in axes.texts] == ["no runs have finished"]
    assert saved(draw_comparison(compare(runs, arms="init.scaling", baseline="exact")[:0]))
