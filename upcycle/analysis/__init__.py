"""From records of runs to defended answers: frames in, frames and figures out."""

# ruff: noqa: E402 - what is missing is said before anything here imports it

from upcycle.options.extras import need

need("upcycle.analysis", "pandas", "scipy", "matplotlib")

from upcycle.analysis.compare import compare, gap_closure
from upcycle.analysis.figures import draw_comparison, draw_curves, draw_frontier
from upcycle.analysis.frontier import frontier, iso_loss_saving
from upcycle.analysis.runs import load_runs

__all__ = [
    "compare",
    "draw_comparison",
    "draw_curves",
    "draw_frontier",
    "frontier",
    "gap_closure",
    "iso_loss_saving",
    "load_runs",
]
