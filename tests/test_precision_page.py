"""docs/precision.md: every command runs, its recipes are the program's, and its table is the measured one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from documents import between, printed_by_commands

from upcycle.precision.recipes import RECIPES
from upcycle.precision.render import operands

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs/precision.md").read_text()


def recipes() -> str:
    lines = ["| `precision` | x | W | dy | made for |", "|---|---|---|---|---|"]
    lines += [
        f"| `{name}` | {' | '.join(operands(recipe).values())} | {recipe.source} |" for name, recipe in RECIPES.items()
    ]
    return "\n".join([*lines, ""])


def measured() -> str:
    """What `benchmarks/precision.py` found."""
    found = json.loads((ROOT / "benchmarks/results/precision.json").read_text())
    lines = [
        f"SmolLM2-135M-Instruct and its E8G8T8 on {found['tokens']:,} tokens of argparse.py, all FFNs in low",
        "precision, nats per token, and over the dense model in float32:",
        "",
        "| | dense | | E8G8T8 | |",
        "|---|---|---|---|---|",
    ]
    exact = found["rows"][0]["dense"]
    for row in found["rows"]:
        cells = [f"{row[name]:.4f} | {100 * (row[name] / exact - 1):+.2f} %" for name in ("dense", "E8G8T8")]
        lines.append(f"| {row['case']} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", "By `python benchmarks/precision.py`.", ""])


def test_recipes_are_the_programs() -> None:
    assert between(TEXT, "recipes") == recipes()


def test_the_table_is_the_measured_one() -> None:
    assert between(TEXT, "measured") == measured()


@pytest.mark.slow
def test_a_small_benchmark(tmp_path: Path) -> None:
    """FP8 is closer to float32 than NVFP4, and a mixture pays what the dense model pays."""
    output = tmp_path / "precision.json"
    small = [f"--source={ROOT / 'models/stdlib-250k'}", "--tokens=256", f"--work={tmp_path / 'work'}"]
    line = [sys.executable, str(ROOT / "benchmarks/precision.py"), *small, f"--output={output}"]
    ran = subprocess.run(line, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    rows = {row["case"]: row for row in json.loads(output.read_text())["rows"]}
    exact = rows["float32"]
    assert abs(rows["fp8_current"]["dense"] - exact["dense"]) < abs(rows["nvfp4"]["dense"] - exact["dense"])
    for name in ("fp8_current", "fp8_block", "mxfp8"):
        assert rows[name]["E8G8T8"] == pytest.approx(rows[name]["dense"], rel=2e-3)


@pytest.mark.slow
def test_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").symlink_to(ROOT / "models")
    printed_by_commands(TEXT, monkeypatch, capsys)
    rows = [json.loads(line) for line in (tmp_path / "low/metrics.jsonl").read_text().splitlines()]
    assert rows[0]["val/loss"] != rows[0]["val/loss_unquantised"]
