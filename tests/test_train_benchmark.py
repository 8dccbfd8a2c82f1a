"""benchmarks/train.py at its smallest: every ratio of the table is there. Nothing is said about time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SMALLEST = ["--tiny", "--steps=2", "--rounds=1", "--sequences=1", "--threads=1"]


def test_the_smallest_benchmark(tmp_path: Path) -> None:
    script, output = ROOT / "benchmarks/train.py", tmp_path / "train.json"
    ran = subprocess.run(
        [sys.executable, str(script), *SMALLEST, f"--work={tmp_path / 'work'}", f"--output={output}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(output.read_text())
    assert [row["case"] for row in found["rows"]] == ["dense", "E8G1T1", "E8G8T8"]
    for row in found["rows"]:
        assert row["turns"] == 2
        for name in ("lightning_over_bare", "metrics_over_lightning"):
            assert 0 < row[name]["min"] <= row[name]["ratio"] <= row[name]["max"]
        assert all(row[f"{kind}_peak_gb"] > 0 for kind in ("bare", "lightning", "metrics"))
    for ratios in found["moe_over_dense"].values():
        assert ratios["step"] > 0
        assert ratios["gradient"] > 0
        assert ratios["flops"] == pytest.approx(1, rel=0.2), "not at equal active FLOPs"
    assert {"commit", "machine", "torch"} <= found["environment"].keys()
    assert not (tmp_path / "work").exists()
