"""benchmarks/start_lasts.py at its smallest: every arm is measured beside the dense one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SMALLEST = ["--steps=2", "--every=1", "--granularity", "2", "--windows=4", "--length=128"]


def test_the_smallest_benchmark(tmp_path: Path) -> None:
    output = tmp_path / "start_lasts.json"
    ran = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/start_lasts.py"), *SMALLEST, f"--output={output}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(output.read_text())
    rows = {row["arm"]: row for row in found["rows"]}
    assert len(rows) == 1 + 2 * 2 * 4 + 3  # topK-then-softmax with T = G at a slower rate too
    assert rows["dense"]["most_above_dense"] == 0
    for row in rows.values():
        assert list(row["loss"]) == ["0", "1", "2"]
        above = max(loss / rows["dense"]["loss"][step] - 1 for step, loss in row["loss"].items())
        assert row["most_above_dense"] == above
    assert found["lost"] == []
