"""Continue a saturated dense model, or upcycle it, at equal FLOPs: which ends lower on held-out text?

    python examples/compare.py [DIRECTORY] [--steps 400] [--seed 0]

Runs both arms at once, one thread each, with `upcycle train` on models/stdlib-250k. Prints a table, draws compare.png.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from upcycle.train.flops import TRAINING_PASSES, forward_flops

MODEL = Path(__file__).parent.parent / "models" / "stdlib-250k"
LENGTH, SEQUENCES = 256, 16
SHARED = (
    f"source={MODEL}",
    f"sequence_length={LENGTH}",
    f"batch.sequences={SEQUENCES}",
    "schedule.peak=1e-3",
    "schedule.final=1e-5",
    "validation.every=100",
    "validation.windows=128",
    "log_every=50",
    "metrics=cheap",
    "progress=false",
    "overwrite=true",
)
ARMS = {
    "continue dense": ("model=dense",),
    "upcycle to E8G4T4": (
        *("model=upcycle", "moe.expansion=8", "moe.granularity=4", "moe.top_k=4"),
        *("target=upcycled_moe", "moe.groups=positions", "optim.expert_lr=0.5"),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, nargs="?", default=Path("demo"))
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps of the dense arm")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    compare(options.directory, steps=options.steps, seed=options.seed)


def compare(directory: Path, *, steps: int, seed: int) -> None:
    """Train both arms, then print and draw."""
    runs = {arm: directory / arm.replace(" ", "-") for arm in ARMS}
    dense = AutoModelForCausalLM.from_pretrained(MODEL)
    per_step = TRAINING_PASSES * forward_flops(dense, None, sequence_length=LENGTH) * LENGTH * SEQUENCES
    budget = f"budget.flops={steps * per_step:.6e}"
    processes = [start(*ARMS[arm], *SHARED, budget, f"seed={seed}", f"output={run}") for arm, run in runs.items()]
    statuses = [process.wait() for process in processes]
    if any(statuses):
        sys.exit(max(statuses))
    curves = {arm: held_out(run) for arm, run in runs.items()}
    Console().print(table(curves))
    draw(curves, directory / "compare.png")
    print(f"{directory / 'compare.png'}: loss against FLOPs")


def start(*arguments: str) -> subprocess.Popen[bytes]:
    print("$ upcycle train", shlex.join(arguments), flush=True)
    command = [str(Path(sys.executable).with_name("upcycle")), "train", *arguments]
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})


def held_out(run: Path) -> list[tuple[float, float]]:
    """(training FLOPs, held-out loss in nats per byte) of every validation."""
    per_step = json.loads((run / "run.json").read_text())["flops_per_step"]
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(row["step"] * per_step, row["val/python/nats_per_byte"]) for row in rows if "val/loss" in row]


def table(curves: dict[str, list[tuple[float, float]]]) -> Table:
    """Step 0, end, and the difference from the first arm's end."""
    shown = Table(title="held-out loss, nats per byte")
    for column in ("arm", "FLOPs", "step 0", "end", "against dense"):
        shown.add_column(column, justify="left" if column == "arm" else "right")
    baseline = next(iter(curves.values()))[-1][1]
    for arm, curve in curves.items():
        (_, first), (flops, last) = curve[0], curve[-1]
        shown.add_row(arm, f"{flops:.3g}", f"{first:.4f}", f"{last:.4f}", f"{last / baseline - 1:+.2%}")
    return shown


def draw(curves: dict[str, list[tuple[float, float]]], file: Path) -> None:
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for (arm, curve), marker in zip(curves.items(), "os", strict=True):
        axes.plot(*zip(*curve, strict=True), marker=marker, label=arm)
    axes.set_xlabel("training FLOPs")
    axes.set_ylabel("held-out loss (nats per byte)")
    axes.set_title("the same dense model, the same text, equal FLOPs")
    axes.legend()
    figure.savefig(file, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
