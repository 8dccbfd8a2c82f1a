"""The commands of docs/scaling.md that do more than plan, as a user gives them, with a smaller budget."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

from documents import commands
from launching import environment

if TYPE_CHECKING:
    import pytest
from ended import Ended

ROOT = Path(__file__).parent.parent.parent
LINES = [line for line in commands((ROOT / "docs/scaling.md").read_text()) if not line.startswith("upcycle plan ")]
SHORTER = {"budget.tokens=4e6": "budget.tokens=32768 log_every=1 validation.windows=4 data.cache_dir=cache"}


def interrupt(started: Ended[str], run: Path) -> None:
    """Send a training command SIGTERM after its first steps, as a scheduler does."""
    metrics = run / "metrics.jsonl"
    while started.poll() is None and not (metrics.exists() and '"train/loss"' in metrics.read_text()):
        time.sleep(0.05)
    started.send_signal(signal.SIGTERM)


def test_they_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").symlink_to(ROOT / "models")
    assert [shlex.split(line)[0] for line in LINES] == ["torchrun", "torchrun", "upcycle", "upcycle", "upcycle"]
    for number, line in enumerate(LINES):
        for given, replacement in SHORTER.items():
            line = line.replace(given, replacement)
        pipe = subprocess.PIPE
        with Ended(shlex.split(line), env=environment(), stdout=pipe, stderr=pipe, text=True) as started:
            if number == 0:
                interrupt(started, tmp_path / "runs/ep")
            said = "".join(started.communicate())
        if number == 0:
            assert json.loads((tmp_path / "runs/ep/run.json").read_text())["status"] == "interrupted", said
            continue
        assert started.returncode == 0, f"{line}\n{said}"
        assert number != 1 or "after step" in said
    record = json.loads((tmp_path / "runs/ep/run.json").read_text())
    assert record["status"] == "finished"
    assert len(record["ranks"]) == 2
    assert all(rank["bytes_read"] and rank["peak_memory"] for rank in record["ranks"])
    assert (tmp_path / "runs/moe/config.json").is_file()
    assert (tmp_path / "recipe/mixtral_bridge.py").is_file()
