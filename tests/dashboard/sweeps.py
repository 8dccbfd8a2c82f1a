"""A sweep that never ran, written by the record's own writer: arms that differ, runs of every fate, hostile names."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from written import config

from upcycle.tracking.record import Record
from upcycle.tracking.schema import SCHEMA_VERSION

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

STEPS = 40
LAYERS, EXPERTS = 2, 8
HOSTILE = "<img src=x onerror=alert(1)> & <b>bold</b> moe.top_k=2 schedule.peak=0.001 with a name that needs two lines"
ENDS = {
    "baseline": (3.0, 3.1, 2.9),
    "init=copy": (2.8, 2.9, 2.71),
    HOSTILE: (3.3, 3.41, 3.19),
    "dense": (3.0, 3.1, 2.9),
}
TEXTS = {
    "question": "Do copies of the FFN train better than its shards?",
    "hypothesis": "No: at this scale <they> are the same.",
    "metric": "val/loss",
    "published": "arXiv 2410.07524 finds no difference.",
}


def write_sweep(root: Path, name: str = "copies", ends: Mapping[str, Sequence[float]] = ENDS) -> Path:
    """A finished sweep: for each arm, runs of seeds 0, 1, … that end at these losses."""
    index = {}
    for number, (arm, finals) in enumerate(ends.items()):
        for seed, end in enumerate(finals):
            directory = f"{name}-{number}-{seed}"
            write_run(root / directory, end, seed=seed, dense=arm == "dense", number=number)
            index[directory] = {"arm": arm, "seed": seed, "overrides": []}
    (root / f"{name}.json").write_text(json.dumps({"sweep": name, **TEXTS, "runs": index}))
    return root


def write_run(directory: Path, end: float, *, seed: int, dense: bool = False, number: int = 0) -> Path:
    """A run that logs whatever training logs, on the way to a held-out loss."""
    resolved = asdict(replace(config("init.scaling=exact"), seed=seed))
    record = Record(directory)
    record.create()
    record.describe(
        schema=SCHEMA_VERSION,
        status="finished",
        config=json.loads(json.dumps(resolved)) | {"model": "dense" if dense else "upcycle"},
        steps=STEPS,
        flops_per_step=10**9,
        data_hash="d" * 64,
        order_hash=f"{seed:064}",
        source_sha256={"model.safetensors": "a" * 64},
        versions={"python": "3.11.2", "torch": "2.13.0"},
        hardware={"machine": "x86_64", "cpus": 2, "threads": 1, "gpus": []},
        git_commit="c" * 40,
    )
    for step in range(STEPS + 1):
        loss = end + 2 * math.exp(-step / 8) + 0.02 * math.sin(step + seed)
        if step:
            record.log(_row(step, loss, dense=dense, number=number + seed), step=step)
        if step % 10 == 0:
            record.log({"val/loss": loss if step < STEPS else end, "val/text/loss": end}, step=step)
    return directory


def change(directory: Path, **content: Any) -> None:
    """Change entries of a run's run.json."""
    file = directory / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | content))


def _row(step: int, loss: float, *, dense: bool, number: int) -> dict[str, Any]:
    row: dict[str, Any] = {
        "train/loss": loss + 0.1,
        "train/grad_norm": 1 + 1 / step,
        "train/learning_rate": 1e-3 * math.cos(step / STEPS * math.pi / 2),
        "train/tokens": step * 128,
        "train/flops": step * 10**9,
        "train/tokens_per_second": 5000.0 + 100 * math.sin(step),
        "train/step_seconds": 0.5,
    }
    if dense:
        return row
    for layer in range(LAYERS):
        weights = [1 + 0.8 * math.sin(step / 9 + expert * (1 + layer) + number) for expert in range(EXPERTS)]
        row[f"moe/layer_{layer}/load"] = [weight / sum(weights) for weight in weights]
    violation = 0.8 * math.exp(-step / 20)
    return row | {
        "moe/max_vio": violation,
        "moe/load_entropy": 1 - violation / 8,
        "moe/dead_experts": max(0, 3 - step // 5),
        "moe/dropped_share": 0.0,
        "moe/whole_ffns": 1.0,
        "moe/router_entropy": 2 - violation,
        "moe/dense_cosine": 1 - step / 100,
        "moe/group_cosine": 1 - step / 150,
    }
