"""Records of shipped sweeps that never ran: the index with the file's own arms, and runs that end as a test says."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from hydra import compose, initialize_config_dir
from written import write_run

from upcycle.options.arguments import CONF
from upcycle.sweep.expand import expand
from upcycle.sweep.plan import COMMAND, sweep_options

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence
    from pathlib import Path

    from upcycle.sweep.config import SweepConfig

START = 1.5
SURROUNDINGS = {
    "hardware": {"machine": "x86_64", "cpus": 2, "threads": 1, "gpus": []},
    "versions": {"python": "3.11.0", "upcycle": "0.1.0"},
    "git_commit": "c" * 40,
}


def options(name: str) -> SweepConfig:
    """Those of a shipped sweep at scale=smoke."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return sweep_options(compose(COMMAND, overrides=[f"+sweeps={name}", "scale=smoke"]))


def write_sweep(
    root: Path,
    name: str,
    *,
    end: Callable[[str, int], float],
    seeds: Sequence[int] = (0, 1, 2),
    unfinished: Collection[tuple[str, int]] = (),
) -> list[str]:
    """Write a sweep's index and runs, whose loss goes from START to end(arm, seed); the names of its arms."""
    sweep = options(name)
    arms = [arm.name for arm in expand(sweep)]
    index = {}
    for number, arm in enumerate(arms):
        for seed in seeds:
            directory = f"{name}-{number}-{seed}"
            index[directory] = {"arm": arm, "seed": seed, "overrides": []}
            status = "failed" if (arm, seed) in unfinished else "finished"
            last = end(arm, seed)
            losses = (START, (START + last) / 2, last)
            facts = {**SURROUNDINGS, "status": status} | ({"source_sha256": None} if "scratch" in arm else {})
            run = write_run(root / directory, losses, seed=seed, facts=facts)
            _add_metrics(run, last)
    content = {"sweep": name, **asdict(sweep), "runs": index}
    (root / f"{name}.json").write_text(json.dumps(content))
    return arms


def _add_metrics(run: Path, last: float) -> None:
    """What rows of mixtures have besides losses."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    extra = {"train/step_seconds": 0.5, "moe/max_vio": last, "moe/dead_experts": 0.0, "moe/dense_cosine": last / 2}
    extra["val/mtp_loss"] = 2 * last
    for row in rows:
        if row["step"]:
            row |= extra
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
