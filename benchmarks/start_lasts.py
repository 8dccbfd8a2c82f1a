"""Whether a mixture's start lasts: held-out loss in the first steps of training, beside the dense model's.

    python benchmarks/start_lasts.py [--steps 60] [--every 10] [--granularity 1 2 4 8] [--windows 64] [--output FILE]

Every granularity, in both router orders, with one and with two groups' worth of active experts, and experts chosen in
each way that keeps groups; one by one (`free`) for comparison. Whole FFNs (granularity 1) have no groups that could
come apart: what they lose, they lose for another reason. With topK-then-softmax and one group the experts' weights are
never scaled, and Adam's steps are large beside them: that shape is measured with half of the experts' learning rate
too. models/stdlib-250k on its own text, 4,096 tokens a step,
a reset to a peak of 1e-3. The status is 1 if a mixture whose groups hold is ever more than 1 % above the dense model at
the same step.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from environment import environment
from hydra import compose, initialize_config_dir
from rich.console import Console
from rich.table import Table

from upcycle.options.arguments import CONF, typed_options
from upcycle.train.config import TrainConfig
from upcycle.train.run import train

SOURCE = Path(__file__).parent.parent / "models/stdlib-250k"
DENSE, LIMIT = "dense", 0.01
SLOWER = "expert_lr=0.5"
ORDERS, WAYS = ("softmax_topk", "topk_softmax"), ("tied", "whole", "positions", "free")


def cases(granularities: list[int]) -> dict[str, tuple[str, ...]]:
    """Options of every arm, by name."""
    arms: dict[str, tuple[str, ...]] = {DENSE: ("model=dense",)}
    for size in granularities:
        for top_k in (size, 2 * size):
            for order in ORDERS:
                shape = (f"moe.granularity={size}", f"moe.top_k={top_k}", f"moe.router_order={order}")
                for way in WAYS if size > 1 else WAYS[-1:]:
                    options = ("model=upcycle", *shape, f"moe.groups={way}")
                    arms[f"E8G{size}T{top_k} {order} {way}"] = options
                    if order == "topk_softmax" and top_k == size and (way != "free" or size == 1):
                        arms[f"E8G{size}T{top_k} {order} {SLOWER} {way}"] = (*options, f"optim.{SLOWER}")
    return arms


def losses(options: tuple[str, ...], given: argparse.Namespace) -> dict[int, float]:
    """Held-out loss by optimizer steps made."""
    with tempfile.TemporaryDirectory() as directory:
        overrides = [
            *options,
            f"source={SOURCE}",
            f"output={directory}/run",
            f"sequence_length={given.length}",
            f"budget.steps={given.steps}",
            "schedule.peak=1e-3",
            f"validation.every={given.every}",
            f"validation.windows={given.windows}",
            "progress=false",
        ]
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config: TrainConfig = typed_options(TrainConfig, compose("train", overrides=overrides))
        train(config, on_start=lambda _run: [])
        rows = [json.loads(line) for line in (Path(directory) / "run/metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["val/loss"] for row in rows if "val/loss" in row}


def table(rows: list[dict[str, Any]]) -> Table:
    made = Table(title="held-out loss, nats per byte")
    steps = list(rows[0]["loss"])
    for column in ("arm", *(f"step {step}" for step in steps), "most above dense"):
        made.add_column(column, justify="left" if column == "arm" else "right")
    for row in rows:
        shown = (f"{row['loss'][step]:.4f}" for step in steps)
        made.add_row(row["arm"], *shown, f"{100 * row['most_above_dense']:+.2f} %")
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--granularity", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name, options in cases(given.granularity).items():
        found = losses(options, given)
        dense = rows[0]["loss"] if rows else found
        above = max(loss / dense[step] - 1 for step, loss in found.items())
        rows.append({"arm": name, "loss": found, "most_above_dense": above})
        print(f"{name}: at most {100 * above:+.2f} % above dense", file=sys.stderr)
    Console(width=160).print(table(rows))
    lost = [row["arm"] for row in rows if row["most_above_dense"] > LIMIT and not row["arm"].endswith("free")]
    content = {"environment": environment(), "limit": LIMIT, "rows": rows, "lost": lost}
    if given.output:
        given.output.write_text(json.dumps(content, indent=1) + "\n")
    for arm in lost:
        print(f"{arm} lost its start", file=sys.stderr)
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
