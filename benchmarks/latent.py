"""Error of FFNs of SmolLM2-135M between latent projections, by size, by shared neurons, and without whitening.

    python benchmarks/latent.py [--layers 2 15 28] [--tokens 24576] [--output FILE]

Fit on modules of the standard library, tested on the first 4,096 tokens of argparse.py, in float32. `plain` takes the
singular vectors of the matrices, `whitened` what `init.latent=compress` takes; of layers early, in the middle and late.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from environment import environment, smollm2_gguf
from rich.console import Console
from rich.table import Table

from upcycle.convert.latents import HELD_OUT, Calibration, Error, Ffn, Moments, Written, one_thread
from upcycle.models.load import load_dense
from upcycle.models.source import DenseSource, open_source
from upcycle.models.text import library_tokens, sample_tokens

if TYPE_CHECKING:
    from torch import Tensor

REDUCTIONS = (2, 4)  # hidden size / latent size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, help="dense model; SmolLM2-135M-Instruct unless given")
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 15, 28])
    parser.add_argument("--tokens", type=int, default=24576, help="to fit on")
    parser.add_argument("--shared", type=int, nargs="+", default=[0, 384, 768], help="neurons of the shared expert")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    source = open_source(str(options.source or smollm2_gguf()))
    with one_thread():
        rows = measure(source, options.layers, tokens=options.tokens, shared=options.shared)
    Console().print(table(rows))
    if options.output:
        fit = {"layers": options.layers, "fit_tokens": options.tokens, "test_tokens": HELD_OUT}
        options.output.write_text(json.dumps({"environment": environment(), **fit, "rows": rows}, indent=2) + "\n")


def measure(source: DenseSource, layers: list[int], *, tokens: int, shared: list[int]) -> list[dict[str, Any]]:
    """Every case; all of them see the same three passes over text."""
    model, ids = source.model, library_tokens(source, tokens=tokens)
    calibration = Calibration(load_dense(source), model, layers)
    moments = {layer: Moments(ffn) for layer, ffn in calibration.ffns.items()}
    calibration.watch(ids, moments)
    written = {
        layer: Together({picked: Written(calibration.ffns[layer], each.order(picked), picked) for picked in shared})
        for layer, each in moments.items()
    }
    calibration.watch(ids, written)
    errors = {
        layer: Together(
            {
                (bases, picked, reduction): Error(calibration.ffns[layer], before.projections(inputs, latent))
                for picked, each in written[layer].observers.items()
                for bases, before, inputs in ways(calibration.ffns[layer], each, moments[layer], plain=not picked)
                for reduction in REDUCTIONS
                for latent in [model.hidden_size // reduction]
            }
        )
        for layer in layers
    }
    calibration.watch(sample_tokens(source, tokens=HELD_OUT), errors)
    rows = []
    for bases, picked, reduction in errors[layers[0]].observers:
        found = [errors[layer].observers[bases, picked, reduction].relative for layer in layers]
        row = {"bases": bases, "shared": picked, "reduction": reduction, "latent": model.hidden_size // reduction}
        rows.append({**row, "errors": found, "mean_error": sum(found) / len(found)})
    return rows


@dataclass(frozen=True)
class Together:
    """Observers of the same FFN."""

    observers: dict[Any, Any]

    def see(self, x_TH: Tensor, h_TF: Tensor, y_TH: Tensor) -> None:
        for observer in self.observers.values():
            observer.see(x_TH, h_TF, y_TH)


def ways(ffn: Ffn, written: Written, moments: Moments, *, plain: bool) -> list[tuple[str, Written, Moments]]:
    """With what was measured, and as if inputs and neurons were white: the matrices' own singular vectors."""
    found = [("whitened", written, moments)]
    if plain:
        white, outputs = Moments(ffn), Written(ffn, moments.order(0), 0)
        white.inputs_HH += torch.eye(len(ffn.down_HF), dtype=torch.float64)
        white.neurons_F += 1 / ffn.down_HF.double().square().sum(0)  # every row counts the same
        outputs.outputs_HH += ffn.down_HF.double() @ ffn.down_HF.double().T
        found.insert(0, ("plain", outputs, white))
    return found


def table(rows: list[dict[str, Any]]) -> Table:
    made = Table(title="relative error of the FFN's output")
    for column in ("bases", "shared neurons", "H / L", "mean", "lowest", "highest"):
        made.add_column(column, justify="left" if column == "bases" else "right")
    for each in rows:
        figures = (f"{value:.3f}" for value in (each["mean_error"], min(each["errors"]), max(each["errors"])))
        made.add_row(each["bases"], str(each["shared"]), str(each["reduction"]), *figures)
    return made


if __name__ == "__main__":
    main()
