"""`load_runs` on the records of a large sweep: 500 runs of 2,000 rows.

    python benchmarks/load_runs.py [--runs 500] [--rows 2000] [--layers 2] [--experts 8] [--cpu-time]
                                   [--output FILE]

The rows are those of a MoE at laptop scale with cheap metrics, written by the record's own writer; every tenth is a
validation. Reading happens in a fresh process, once after the files have been written, so that they are in the page
cache, and with imports left out: `finished` runs, which kept their columns when they ended and which the limit is for,
and then the same runs without them, such as runs that were killed, from their rows alone. Each is the first reading.
On a machine that others use too, `--cpu-time` holds the seconds in which the process ran against the limit.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from environment import environment

from upcycle.analysis import load_runs
from upcycle.routing.statistics import RoutingSums
from upcycle.tracking.packs import packs_in, run_texts
from upcycle.tracking.record import METRICS, Record
from upcycle.tracking.rows import COLUMNS, keep_columns
from upcycle.train.metrics import routing_row

LAPTOP = Path(__file__).parent.parent / "analysis/results/laptop"
LIMIT = 5.0  # seconds for the default size


def write_runs(root: Path, given: argparse.Namespace) -> int:
    """Write the records, and return their size in bytes."""
    content = upcycled_run()
    config = content.pop("config")
    lines = rows(given)
    for run in range(given.runs):
        record = Record(root / f"{run:05}")
        record.create()
        seed, peak = run % 5, 1e-3 * (1 + run // 5)
        record.describe(
            **content | {"steps": 10 * given.rows, "order_hash": f"{seed:064}"},
            config={**config, "seed": seed, "schedule": {**config["schedule"], "peak": peak}},
        )
        (record.directory / METRICS).write_text(lines)
        keep_columns(record.directory)
    return sum(file.stat().st_size for file in root.rglob(METRICS))


def upcycled_run() -> dict[str, Any]:
    """run.json of a run of the campaign that trained a MoE."""
    contents = (json.loads(text) for file in packs_in(LAPTOP) for text in run_texts(file).values())
    return next(content for content in contents if content["config"]["model"] == "upcycle")


def rows(given: argparse.Namespace) -> str:
    """The rows of one run, as text."""
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as directory:
        record = Record(Path(directory))
        for row in range(given.rows):
            step = 10 * (row + 1)
            loss = float(torch.rand((), generator=generator))
            if row % 10 == 9:
                validation = {"val/loss": loss, "val/perplexity": loss, "val/python/loss": loss}
                record.log({**validation, "val/python/nats_per_byte": loss}, step=step - 10)
            else:
                record.log(training_row(loss, step, given, generator), step=step)
        return (Path(directory) / METRICS).read_text()


def training_row(loss: float, step: int, given: argparse.Namespace, generator: torch.Generator) -> dict[str, Any]:
    names = ("loss", "perplexity", "aux_loss", "z_loss", "grad_norm", "learning_rate", "step_seconds")
    training = {
        **{f"train/{name}": loss / (1 + place) for place, name in enumerate(names)},
        "train/tokens": step * 4096,
        "train/flops": step * 10**10,
        "train/tokens_per_second": 1e4 * loss,
    }
    if not given.layers:
        return training
    load_LN = torch.randint(1, 1000, (given.layers, given.experts), generator=generator)
    tokens_L = load_LN.sum(-1)
    sums = RoutingSums(
        load=load_LN,
        tokens=tokens_L,
        dropped=tokens_L * 0,
        entropy=tokens_L * loss,
        mass=tokens_L * loss / 3,
        whole=tokens_L,
    )
    return training | routing_row(sums, tuple(range(given.layers)))


def in_fresh_process(root: Path) -> dict[str, Any]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(timed, root).result()


def timed(root: Path) -> dict[str, Any]:
    """Load, and say how long it took and what came."""
    start, start_cpu = time.perf_counter(), time.process_time()
    frame = load_runs(root)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
    size = int(frame.memory_usage(deep=True).sum())
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "rows": len(frame),
        "columns": len(frame.columns),
        "bytes": size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--rows", type=int, default=2000, help="per run")
    parser.add_argument("--layers", type=int, default=2, help="MoE layers; 0 for a dense model")
    parser.add_argument("--experts", type=int, default=8, help="per layer")
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    given = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="load-runs-"))
    try:
        written = write_runs(root, given)
        finished = in_fresh_process(root)
        for copy in root.rglob(COLUMNS):
            copy.unlink()
        killed = in_fresh_process(root)
    finally:
        shutil.rmtree(root)
    size = {"runs": given.runs, "rows_per_run": given.rows, "written_bytes": written}
    result = {**size, "finished": finished, "killed": killed}
    print(json.dumps(result, indent=2))
    if given.output:
        given.output.write_text(json.dumps({"environment": environment(), **result}, indent=2) + "\n")
    if given.runs * given.rows >= 10**6 and finished["cpu_seconds" if given.cpu_time else "seconds"] > LIMIT:
        sys.exit(f"over the limit of {LIMIT} s")


if __name__ == "__main__":
    main()
