"""The equivalence report: table, JSON and figure."""

from __future__ import annotations

import logging
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from upcycle.errors import OutputError
from upcycle.files.json import json_text
from upcycle.models.manifest import REPORT
from upcycle.options.extras import has, install_line

if TYPE_CHECKING:
    from collections.abc import Mapping

FIGURE = "equivalence.png"
NO_NUMBER = "no number"
PLOTTER = "matplotlib"

_log = logging.getLogger("upcycle")


def write_report(report: Mapping[str, Any], directory: str) -> None:
    """Write equivalence.json and equivalence.png into the MoE's directory, each under its name only when complete.

    Without matplotlib there is no figure, nor an older one, and a warning says so.

    Raises:
        OutputError: the directory cannot be written.
    """
    folder = Path(directory).expanduser()
    try:
        unfinished = folder / f".{REPORT}"
        unfinished.write_text(json_text(report, indent=2) + "\n")
        os.replace(unfinished, folder / REPORT)
        if has(PLOTTER):
            unfinished = folder / f".{FIGURE}"
            _figure(report, unfinished)
            os.replace(unfinished, folder / FIGURE)
        else:
            (folder / FIGURE).unlink(missing_ok=True)
            _log.warning("no %s without %s: %s", FIGURE, PLOTTER, install_line(PLOTTER))
    except OSError as error:
        raise OutputError("the report cannot be written", found=str(error), remedy="make moe=DIR writable") from error


def report_table(report: Mapping[str, Any]) -> RenderableType:
    """The report for people."""
    table = Table(box=box.SIMPLE, show_header=False, title=f"{report['name']} ({report['model_type']}) against dense")
    text = report["text"]
    rows = [
        ("text", f"{text['file']}, {text['tokens']} tokens, float32"),
        *_outputs(report),
        ("whole FFNs", f"{100 * report['whole_ffns']:.3f} % of routed tokens"),
        ("FFN output error", _most(report)),
    ]
    for row in rows:
        table.add_row(*row)
    lines = [f"expected: {line}" for line in report["expected_losses"] or ()]
    lines.append("equivalent" if report["passed"] else "NOT equivalent: the gap is over the tolerance")
    return Group(table, _layer_table(report), *map(Text, lines))


def _outputs(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    tolerance = f"(tolerance {100 * report['tolerance']:g} %)"
    if "score_gap" in report:
        return [
            ("dense scores", f"{report['score_rms']:.5f}, root mean square"),
            ("error", f"{report['score_rms_error']:.3e} root mean square, {report['score_max_error']:.3e} at most"),
            ("gap", f"{_percent(report['score_gap'])} of the scores' mean square {tolerance}"),
        ]
    return [
        ("dense loss", f"{report['dense_loss']:.5f} nats per token"),
        ("MoE loss", f"{report['moe_loss']:.5f} nats per token"),
        ("gap", f"{_percent(report['loss_gap'])} {tolerance}"),
        ("KL(dense || MoE)", f"{report['kl']:.3e} nats per token"),
        ("same top-1 token", f"{100 * report['top1_agreement']:.2f} %"),
    ]


def _layer_table(report: Mapping[str, Any]) -> Table:
    table = Table(box=box.SIMPLE, title="by layer")
    for column in ("layer", "FFN output error", "whole FFNs"):
        table.add_column(column, justify="right")
    for layer in report["layers"]:
        error, whole = layer["ffn_relative_error"], layer["whole_ffns"]
        table.add_row(str(layer["layer"]), NO_NUMBER if error is None else f"{error:.3e}", f"{100 * whole:.3f} %")
    return table


def _most(report: Mapping[str, Any]) -> str:
    """The largest FFN error, or the layers whose error is no number."""
    without = [str(layer["layer"]) for layer in report["layers"] if layer["ffn_relative_error"] is None]
    if without:
        why = "the dense FFN gives zeros alone and the MoE does not, or one is not finite"
        return f"{NO_NUMBER} in layer {', '.join(without)}: {why}"
    return f"at most {report['max_ffn_relative_error']:.3e} of its norm"


def _percent(share: float | None) -> str:
    return NO_NUMBER if share is None else f"{100 * share:+.4f} %"


def _figure(report: Mapping[str, Any], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    layers = report["layers"]
    errors = [math.nan if (error := layer["ffn_relative_error"]) is None else error for layer in layers]
    axes.plot([layer["layer"] for layer in layers], errors, marker="o")
    if any(error > 0 for error in errors):
        axes.set_yscale("log")
    axes.set_xlabel("layer")
    axes.set_ylabel("relative error of the FFN block's output")
    gap = "score_gap" if "score_gap" in report else "loss_gap"
    axes.set_title(f"{report['name']} ({report['model_type']}): gap {_percent(report[gap])}")
    axes.grid(visible=True, which="both", alpha=0.3)
    figure.savefig(file, format="png", dpi=120)
