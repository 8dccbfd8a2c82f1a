"""Conversion with one worker and with several, of a scaled-down model of the shape of Llama 3 70B.

    python benchmarks/convert_workers.py [--shrink 4] [--layers 8] [--workers 2] [--repeats 3] [--output FILE]

Every round converts with one worker and with several, in turns, next to a plain write of as many bytes. Writing is
timed from the first byte to the finished output; what comes before it, such as starting processes, on its own. What
counts is the ratio of the writing, which must not exceed 1; `upcycle plan` extrapolates from the rate of one worker.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from disk import plain_write, warm_up
from environment import environment
from rich.console import Console
from rich.table import Table

from upcycle.options.arguments import CONF, typed_options
from upcycle.options.config import ConvertConfig

if TYPE_CHECKING:
    from upcycle.convert.prepare import Conversion

EXAMPLES = Path(__file__).parent.parent / "examples"
FILES = 16
COPIES = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("bench-workers"), help="scratch directory, removed after")
    parser.add_argument("--shrink", type=int, default=4, help="divides every width of the model")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    options.work.mkdir(parents=True)
    try:
        source = options.work / "dense"
        sizes = [f"--shrink={options.shrink}", f"--layers={options.layers}"]
        generate = [sys.executable, EXAMPLES / "scaled_down.py", EXAMPLES / "llama-3-70b", source, *sizes]
        subprocess.run(generate, check=True, capture_output=True)
        found = measure(source, options.work, options.workers, options.repeats)
    finally:
        shutil.rmtree(options.work)
    Console().print(table(found))
    if options.output:
        described = {"shape": f"Llama 3 70B, widths / {options.shrink}, {options.layers} layers", "load_average": load}
        content = {"environment": environment(), **described, **found}
        options.output.write_text(json.dumps(content, indent=2) + "\n")
    if found["several_over_one"] > 1:
        sys.exit(f"{options.workers} workers take longer than one")


def measure(source: Path, work: Path, workers: int, repeats: int) -> dict[str, Any]:
    """Medians over `repeats` rounds (one worker, several, plain write)."""
    plain = work / "plain.bin"
    shard = sum(file.stat().st_size for file in source.glob("*.safetensors")) * COPIES // FILES
    rounds: list[tuple[Times, Times, float]] = []
    for number in range(repeats):
        one = converted(source, work / "moe", workers=1, shard=shard)
        if not number:
            warm_up(plain, one.nbytes)
        several = converted(source, work / "moe", workers=workers, shard=shard)
        rounds.append((one, several, plain_write(plain, one.nbytes)))
        plain.unlink()
    writing = statistics.median(one.writing for one, _, _ in rounds)
    ratios = [several.writing / one.writing for one, several, _ in rounds]
    return {
        "gigabytes": one.nbytes / 1e9,
        "workers": workers,
        "one_worker_seconds": writing,
        "several_workers_seconds": statistics.median(several.writing for _, several, _ in rounds),
        "plain_write_seconds": statistics.median(written for _, _, written in rounds),
        "start_of_workers_seconds": statistics.median(several.starting for _, several, _ in rounds),
        "several_over_one": statistics.median(ratios),
        "ratios": ratios,
        "one_worker_bytes_per_second": one.nbytes / writing,
    }


@dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds from the plan to the first byte, and from there to the output; bytes of tensors in it."""

    starting: float
    writing: float
    nbytes: int


def converted(source: Path, output: Path, *, workers: int, shard: int) -> Times:
    """Convert, time it, and delete the output."""
    from upcycle.convert.run import convert  # here: new processes import this file, and need no transformers

    given = [f"source={source}", f"output={output}", f"workers={workers}", f"max_shard_size={shard // 1000}KB"]
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        config = typed_options(ConvertConfig, hydra.compose("convert", overrides=given))
    times: list[float] = []
    sizes: list[int] = []

    def on_plan(_conversion: Conversion, _nbytes: int):
        os.sync()
        times.append(time.perf_counter())
        return on_bytes

    def on_bytes(count: int) -> None:
        sizes.append(count)
        if count and len(times) == 1:
            times.append(time.perf_counter())

    convert(config, on_plan=on_plan)
    end = time.perf_counter()
    shutil.rmtree(output)
    return Times(starting=times[1] - times[0], writing=end - times[1], nbytes=sum(sizes))


def table(found: dict[str, Any]) -> Table:
    shown = Table(title=f"upcycle convert of {found['gigabytes']:.2f} GB, E8G8T8, bfloat16")
    for column in ("", "seconds", "GB/s"):
        shown.add_column(column, justify="right" if column else "left")
    names = {
        "one_worker_seconds": "1 worker",
        "several_workers_seconds": f"{found['workers']} workers",
        "plain_write_seconds": "plain write",
    }
    for name, label in names.items():
        shown.add_row(label, f"{found[name]:.2f}", f"{found['gigabytes'] / found[name]:.3f}")
    shown.add_row("starting workers", f"{found['start_of_workers_seconds']:.2f}", "")
    shown.add_row("ratio", f"{found['several_over_one']:.2f}", "")
    return shown


if __name__ == "__main__":
    main()
