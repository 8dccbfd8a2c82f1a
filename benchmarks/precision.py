"""Step 0 in low precision: held-out loss of SmolLM2-135M and of its E8G8T8, in every recipe.

    python benchmarks/precision.py [--source DIR] [--work DIR] [--tokens 1024] [--output FILE]

FFNs and experts alone are in low precision, everything else in float32, on the first tokens of argparse.py.
"""

from __future__ import annotations

import argparse
import json
import shutil
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from environment import environment, smollm2
from hydra import compose, initialize_config_dir
from rich.console import Console
from rich.table import Table

from upcycle.convert.run import convert
from upcycle.kernels.select import install_kernel
from upcycle.models.load import load_checkpoint, load_dense
from upcycle.models.moe import describe_moe
from upcycle.models.source import open_source
from upcycle.models.text import sample_tokens
from upcycle.options.arguments import CONF, typed_options
from upcycle.options.config import ConvertConfig
from upcycle.precision.config import QuantiseConfig
from upcycle.precision.install import install_precision
from upcycle.precision.recipes import RECIPES

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from upcycle.models.moe import MoeDescription

SHAPE = ("moe.expansion=8", "moe.granularity=8", "moe.top_k=8")
KEPT = 1 / 6  # of the layers, the last ones
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "float32": ("float32", {}),
    **{name: (name, {}) for name in RECIPES},
    "nvfp4, weights in lines": ("nvfp4", {"squares": False}),
    "nvfp4, last sixth kept": ("nvfp4", {"last": KEPT}),
    "nvfp4, first sixth kept": ("nvfp4", {"first": KEPT}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, help="dense model; SmolLM2-135M-Instruct unless given")
    parser.add_argument("--work", type=Path, default=Path("bench-precision"), help="scratch directory, removed after")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    options.work.mkdir(parents=True)
    try:
        source = options.source or smollm2(options.work / "smollm2", dtype="float32")
        rows = measure(source, options.work / "moe", tokens=options.tokens)
    finally:
        shutil.rmtree(options.work)
    Console().print(table(rows))
    if options.output:
        content = {"environment": environment(), "tokens": options.tokens, "rows": rows}
        options.output.write_text(json.dumps(content, indent=2) + "\n")


def measure(source: Path, directory: Path, *, tokens: int) -> list[dict[str, Any]]:
    """A row for each case."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        given = [f"source='{source}'", f"output='{directory}'", *SHAPE]
        convert(typed_options(ConvertConfig, compose("convert", overrides=given)), on_plan=lambda *_: lambda _: None)
    opened = open_source(str(source))
    ids = sample_tokens(opened, tokens=tokens)[None]
    dense, mixture, moe = load_dense(opened), load_checkpoint(directory), describe_moe(directory)
    rows = []
    for name, (precision, changes) in CASES.items():
        options = QuantiseConfig(rest="float32", **changes)
        losses = {
            "dense": loss(dense, None, ids, precision, options),
            "E8G8T8": loss(mixture, moe, ids, precision, options),
        }
        print(name, *(f"{value:.5f}" for value in losses.values()), flush=True)
        rows.append({"case": name, "precision": precision, "quantise": changes, **losses})
    return rows


def loss(
    model: PreTrainedModel, moe: MoeDescription | None, ids: Tensor, precision: str, options: QuantiseConfig
) -> float:
    """Nats per token of a copy of the model in low precision."""
    lowered = deepcopy(model).eval()
    install_precision(lowered, moe, precision, options, seed=0)
    if moe:
        install_kernel(lowered, "auto", device=torch.device("cpu"), dtype=torch.float32)
    with torch.no_grad():
        return float(lowered(input_ids=ids, labels=ids).loss)


def table(rows: list[dict[str, Any]]) -> Table:
    exact = rows[0]
    made = Table(title="held-out loss at step 0")
    for column in ("case", "dense", "gap %", "E8G8T8", "gap %"):
        made.add_column(column, justify="left" if column == "case" else "right")
    for row in rows:
        cells = []
        for model in ("dense", "E8G8T8"):
            cells += [f"{row[model]:.5f}", f"{100 * (row[model] / exact['dense'] - 1):+.2f}"]
        made.add_row(row["case"], *cells)
    return made


if __name__ == "__main__":
    main()
