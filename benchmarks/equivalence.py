"""Step-0 loss of SmolLM2-135M after conversion, over router order, shape, scaling and MoE type.

    python benchmarks/equivalence.py [--work DIR] [--output FILE] [--only NAME ...]

Each row is one `upcycle convert` and one `upcycle verify` in float32 on the first 1,024 tokens of argparse.py.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from environment import environment, smollm2
from rich.console import Console
from rich.table import Table

SHAPES = {"E8G8T8": (8, 8, 8), "E8G1T2": (8, 1, 2), "E8G1T1": (8, 1, 1)}
UPCYCLE = str(Path(sys.executable).with_name("upcycle"))


def cases() -> dict[str, list[str]]:
    """Row name -> options."""
    found = {}
    for order in ("softmax_topk", "topk_softmax"):
        for shape in ("E8G8T8", "E8G1T2"):
            for target in ("auto", "upcycled_moe"):
                found[f"{shape} {order} exact {target}"] = [
                    *sizes(shape),
                    f"moe.router_order={order}",
                    f"target={target}",
                ]
    for shape in ("E8G8T8", "E8G1T1"):
        for scaling in ("paper", "none"):
            options = [*sizes(shape), f"init.scaling={scaling}", "init.router_std=0.02"]
            found[f"{shape} softmax_topk {scaling} std 0.02"] = options
        found[f"{shape} softmax_topk exact std 0.02"] = [*sizes(shape), "init.router_std=0.02"]
        calibrated = [*sizes(shape), "init.scaling=calibrated", "init.router_std=0.02"]
        found[f"{shape} softmax_topk calibrated std 0.02"] = calibrated
    for scaling in ("paper", "none"):
        options = [*sizes("E8G8T8"), "moe.router_order=topk_softmax", f"init.scaling={scaling}"]
        found[f"E8G8T8 topk_softmax {scaling}"] = options
    return found


def sizes(shape: str) -> list[str]:
    names = ("expansion", "granularity", "top_k")
    return [f"moe.{name}={value}" for name, value in zip(names, SHAPES[shape], strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("bench-equivalence"), help="scratch directory, removed after")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--only", nargs="*", default=[""], help="rows whose name contains one of these")
    options = parser.parse_args()
    options.work.mkdir(parents=True)
    try:
        source = smollm2(options.work / "smollm2", dtype="float32")
        chosen = {name: case for name, case in cases().items() if any(part in name for part in options.only)}
        rows = [measure(name, case, source, options.work / "moe") for name, case in chosen.items()]
    finally:
        shutil.rmtree(options.work)
    Console().print(table(rows))
    if options.output:
        options.output.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=2) + "\n")


def measure(name: str, options: list[str], source: Path, moe: Path) -> dict[str, Any]:
    """Convert, verify, and keep the report."""
    arguments = [f"source={source}", f"output={moe}", "overwrite=true", *options]
    subprocess.run([UPCYCLE, "convert", *arguments], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    subprocess.run(
        [UPCYCLE, "verify", f"source={source}", f"moe={moe}"],
        check=False,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    report = json.loads((moe / "equivalence.json").read_text())
    kept = ("model_type", "dense_loss", "moe_loss", "loss_gap", "kl", "top1_agreement", "whole_groups")
    row = {"case": name, "options": options, **{key: report[key] for key in kept}}
    row["max_ffn_relative_error"] = report["max_ffn_relative_error"]
    print(name, f"{row['moe_loss']:.4f} {100 * row['loss_gap']:+.4f} %", flush=True)
    return row


def table(rows: list[dict[str, Any]]) -> Table:
    shown = Table(title="SmolLM2-135M, argparse.py, float32")
    for column in ("case", "type", "dense loss", "MoE loss", "gap %", "KL", "top-1 %", "whole groups %"):
        shown.add_column(column, justify="left" if column in ("case", "type") else "right")
    for row in rows:
        gap, kl = f"{100 * row['loss_gap']:+.4f}", f"{row['kl']:.1e}"
        shares = (f"{100 * row[name]:.2f}" for name in ("top1_agreement", "whole_groups"))
        losses = (f"{row[name]:.4f}" for name in ("dense_loss", "moe_loss"))
        shown.add_row(row["case"], row["model_type"], *losses, gap, kl, *shares)
    return shown


if __name__ == "__main__":
    main()
