"""A short upcycling run on the card, in bfloat16 and in FP8: its loss falls."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from needs import device, say

MODEL = Path(__file__).parents[2] / "models/stdlib-250k"
OPTIONS = (
    "sequence_length=256",
    "batch.sequences=16",
    "validation.every=20",
    "validation.windows=64",
    "progress=false",
    "log_every=1",
)
SHAPE = ("model=upcycle", "moe.expansion=8", "moe.granularity=4", "moe.top_k=4")
card = device()
found = {}
with tempfile.TemporaryDirectory() as directory:
    for precision in ("bfloat16", "fp8_current"):
        output = Path(directory) / precision
        steps = f"budget.steps={40 if card.type == 'cuda' else 2}"
        given = [
            steps,
            *SHAPE,
            *OPTIONS,
            f"source={MODEL}",
            f"output={output}",
            f"precision={precision}",
            f"device={card.type}",
        ]
        line = [sys.executable, "-c", "from upcycle.cli import main; main()", "train", *given]
        ended = subprocess.run(line, capture_output=True, text=True, check=False)
        if ended.returncode:
            raise SystemExit(ended.stderr[-400:])
        rows = [json.loads(row) for row in (output / "metrics.jsonl").read_text().splitlines()]
        losses = [row["val/loss"] for row in rows if "val/loss" in row]
        speed = next(row["train/tokens_per_second"] for row in reversed(rows) if "train/tokens_per_second" in row)
        found[precision] = f"held-out loss {losses[0]:.4f} to {losses[-1]:.4f}, {speed:,.0f} tokens/s"
        if losses[-1] >= losses[0] + 0.2:
            raise SystemExit(f"{precision}: the loss rose: {losses}")
say(found)
