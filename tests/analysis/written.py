"""Records of runs that never ran, written by the record's own writer; only what the analysis reads is true of them."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training import options

from upcycle.tracking.record import Record
from upcycle.tracking.schema import SCHEMA_VERSION

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

STEPS = 4


@cache
def config(*changes: str) -> Any:
    """Options of a run as `upcycle train` resolves them."""
    return options(
        Path("text"),
        Path("run"),
        "model=upcycle",
        "source=dense",
        "moe.expansion=2",
        "moe.granularity=2",
        "moe.top_k=2",
        *changes,
    )


def write_run(
    directory: Path,
    losses: Sequence[float],
    *,
    changes: Sequence[str] = (),
    seed: int = 0,
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """A run whose validation loss is losses[i] at step i, with a training row after every step."""
    resolved = asdict(replace(config(*changes), seed=seed))
    started_from = None if resolved["model"] == "scratch" else {"model.safetensors": "a" * 64}
    record = Record(directory)
    record.create()
    content = {
        "schema": SCHEMA_VERSION,
        "status": "finished",
        "config": json.loads(json.dumps(resolved)),
        "steps": STEPS,
        "flops_per_step": 1000,
        "data_hash": "d" * 64,
        "order_hash": f"{seed:064}",
        "source_sha256": started_from,
        "git_commit": None,
    }
    record.describe(**content | dict(facts or {}))
    for step, loss in enumerate(losses):
        if step:
            record.log({"train/loss": loss + 0.1, "moe/layer_0/load": [0.25, 0.75]}, step=step)
        record.log({"val/loss": loss, "val/text/loss": loss}, step=step)
    return directory


def write_arms(root: Path, ends: Mapping[str, Sequence[float]], **facts: Any) -> Path:
    """For each arm (a value of moe.top_k's place in `init.scaling`) runs of seeds 0, 1, … that end at these losses."""
    for arm, finals in ends.items():
        for seed, end in enumerate(finals):
            write_run(root / f"{arm}-{seed}", (4.0, 3.5, end), changes=(f"init.scaling={arm}",), seed=seed, facts=facts)
    return root
