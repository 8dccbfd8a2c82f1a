"""The commands of docs/scaling.md that do more than plan, as a user gives them, with a smaller budget."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from documents import commands
from launching import environment

if TYPE_CHECKING:
    import pytest

ROOT = Path(__file__).parent.parent.parent
LINES = [line for line in commands((ROOT / "docs/scaling.md").read_text()) if not line.startswith("upcycle plan ")]
SHORTER = {"budget.tokens=4e6": "budget.tokens=16384 validation.windows=4 data.cache_dir=cache"}


def test_they_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").symlink_to(ROOT / "models")
    assert [shlex.split(line)[0] for line in LINES] == ["torchrun", "torchrun", "upcycle", "upcycle", "upcycle"]
    for line in LINES:
        for given, replacement in SHORTER.items():
            line = line.replace(given, replacement)
        ended = subprocess.run(shlex.split(line), env=environment(), capture_output=True, text=True, check=False)
        assert ended.returncode == 0, f"{line}\n{ended.stdout}\n{ended.stderr}"
    record = json.loads((tmp_path / "runs/ep/run.json").read_text())
    assert record["status"] == "finished"
    assert len(record["ranks"]) == 2
    assert all(rank["bytes_read"] and rank["peak_memory"] for rank in record["ranks"])
    assert (tmp_path / "runs/moe/config.json").is_file()
    assert (tmp_path / "recipe/mixtral_bridge.py").is_file()
