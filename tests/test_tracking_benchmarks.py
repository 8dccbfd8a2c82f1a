"""benchmarks/load_runs.py and log_cost.py at their smallest: what they count is there. Nothing is said about time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
LAYERS, EXPERTS, RUNS, ROWS = 1, 2, 2, 20


def printed(*command: str) -> dict[str, Any]:
    """The JSON that a benchmark prints."""
    ran = subprocess.run([sys.executable, *command], cwd=BENCHMARKS, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    found: dict[str, Any] = json.loads(ran.stdout[ran.stdout.index("{") :])
    return found


def test_load_runs(tmp_path: Path) -> None:
    output = tmp_path / "load_runs.json"
    sizes = [f"--runs={RUNS}", f"--rows={ROWS}", f"--layers={LAYERS}", f"--experts={EXPERTS}"]
    found = printed("load_runs.py", *sizes, f"--output={output}")
    validations = ROWS // 10
    for kind in ("finished", "killed"):  # a validation joins the training row of its step
        assert found[kind]["rows"] == RUNS * (ROWS - validations)
        assert found[kind]["seconds"] > 0
    assert found["killed"]["columns"] == found["finished"]["columns"]
    assert {"commit", "machine", "torch"} <= json.loads(output.read_text())["environment"].keys()


def test_log_cost() -> None:
    """Two rows are not timed, and so neither are the first two steps."""
    smaller = ("log_every=1", "batch.sequences=1", "sequence_length=64")
    found = printed("-c", f"import json, log_cost; print(json.dumps(log_cost.measured(6, *{smaller})))")
    assert found["steps"] == 4
    assert found["shares"].keys() == {"threads", "service", "mirror", "routers", "rows"}
    assert found["share"] == pytest.approx(sum(found["shares"].values()))
    assert found["shares"]["routers"] > 0
