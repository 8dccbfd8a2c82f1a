"""docs/converting.md: every command runs, on a smaller model, and the plan of 70B says what it extrapolates from."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from cli import command
from documents import commands

ROOT = Path(__file__).parent.parent
SMALLER = {"--layers 8": "--layers 1", "100MB": "40MB"}


@pytest.mark.slow
def test_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    printed = []
    for line in commands((ROOT / "docs/converting.md").read_text()):
        for given, replacement in SMALLER.items():
            line = line.replace(given, replacement)
        program, *words = shlex.split(line)
        assert program in ("python", "upcycle"), line
        run = command(*words) if program == "upcycle" else [sys.executable, *words]
        ended = subprocess.run(run, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, f"{line}\n{ended.stdout}\n{ended.stderr}"
        printed.append(ended.stdout)
    assert len(list((tmp_path / "scaled-down-moe").glob("*.safetensors"))) > 4
    plan = printed[-1]
    assert "465,196,425,216" in plan
    assert "an extrapolation" in plan
    assert "measured on" in plan
