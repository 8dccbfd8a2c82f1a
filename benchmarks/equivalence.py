"""Step-0 loss of SmolLM2-135M after conversion: every arm of sweeps/step0.yaml.

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
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

SWEEP = Path(__file__).parent.parent / "sweeps/step0.yaml"
UPCYCLE = str(Path(sys.executable).with_name("upcycle"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("bench-equivalence"), help="scratch directory, removed after")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--only", nargs="*", default=[""], help="rows whose name contains one of these")
    options = parser.parse_args()
    options.work.mkdir(parents=True)
    try:
        source = smollm2(options.work / "smollm2", dtype="float32")
        arms = OmegaConf.load(SWEEP).sweep.arms
        chosen = [name for name in arms if any(part in name for part in options.only)]
        rows = [measure(name, list(arms[name]), source, options.work / "moe") for name in chosen]
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
    kept = ("model_type", "dense_loss", "moe_loss", "loss_gap", "kl", "top1_agreement", "whole_ffns")
    row = {"case": name, "options": options, **{key: report[key] for key in kept}}
    row["max_ffn_relative_error"] = report["max_ffn_relative_error"]
    print(name, f"{row['moe_loss']:.4f} {100 * row['loss_gap']:+.4f} %", flush=True)
    return row


def table(rows: list[dict[str, Any]]) -> Table:
    shown = Table(title="SmolLM2-135M, argparse.py, float32")
    for column in ("case", "type", "dense loss", "MoE loss", "gap %", "KL", "top-1 %", "whole FFNs %"):
        shown.add_column(column, justify="left" if column in ("case", "type") else "right")
    for row in rows:
        gap, kl = f"{100 * row['loss_gap']:+.4f}", f"{row['kl']:.1e}"
        shares = (f"{100 * row[name]:.2f}" for name in ("top1_agreement", "whole_ffns"))
        losses = (f"{row[name]:.4f}" for name in ("dense_loss", "moe_loss"))
        shown.add_row(row["case"], row["model_type"], *losses, gap, kl, *shares)
    return shown


if __name__ == "__main__":
    main()
