"""`make demo`: dense and MoE say the same, and upcycling wins."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_demo_runs(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, str(ROOT / "examples/demo.py"), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "equivalent" in ended.stdout
    dense, moe = re.findall(r"--- (?:dense|MoE)\n(.*?)(?=\n---|\n─)", ended.stdout, flags=re.DOTALL)
    assert dense == moe
    losses = [float(loss) for loss in re.findall(r"step \d+: loss ([\d.]+)", ended.stdout)]
    assert losses[-1] < losses[0] - 0.5
    gain = re.search(r"upcycle to E8G4T4.*?([-+][\d.]+)%", ended.stdout)
    assert gain
    assert float(gain[1]) < 0, "upcycling lost to continuing the dense model"
    assert (tmp_path / "compare.png").is_file()
