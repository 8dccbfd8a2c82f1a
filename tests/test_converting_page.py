"""docs/converting.md: every command runs, on a smaller model, and the plan of 70B says what it extrapolates from."""

from __future__ import annotations

import hashlib
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from cli import command
from documents import between, commands

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs/converting.md").read_text()
SMALLER = {"--layers 8": "--layers 1", "100MB": "40MB"}


def hashes(directory: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in directory.iterdir()}


def workers() -> str:
    """What `benchmarks/convert_workers.py` found."""
    found = json.loads((ROOT / "benchmarks/results/convert_workers.json").read_text())
    one, machine = found["one_worker_seconds"], found["environment"]["machine"]
    several, plain = found["several_over_one"], found["plain_write_seconds"] / one
    ratios = ", ".join(f"{ratio:.2f}" for ratio in sorted(found["ratios"]))
    return (
        f"Measured with {found['gigabytes']:.1f} GB ({found['shape']}) on {machine}, load average "
        f"{found['load_average']:.1f}: {found['workers']} workers took **{several:.2f}** times as long as one "
        f"(rounds: {ratios}), a plain write of as many bytes {plain:.2f} times.\n"
    )


def test_the_ratio_is_the_measured_one() -> None:
    assert between(TEXT, "workers") == workers()


@pytest.mark.slow
def test_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    printed = []
    for line in commands(TEXT):
        for given, replacement in SMALLER.items():
            line = line.replace(given, replacement)
        program, *words = shlex.split(line)
        assert program in ("python", "upcycle"), line
        run = command(*words) if program == "upcycle" else [sys.executable, *words]
        ended = subprocess.run(run, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, f"{line}\n{ended.stdout}\n{ended.stderr}"
        printed.append(ended.stdout)
    assert len(list((tmp_path / "scaled-down-moe").glob("*.safetensors"))) > 4
    serial = command("convert", "source=scaled-down", "output=serial", f"max_shard_size={SMALLER['100MB']}")
    subprocess.run(serial, capture_output=True, check=True)
    assert hashes(tmp_path / "scaled-down-moe") == hashes(tmp_path / "serial")
    plan = printed[-1]
    assert "465,196,425,216" in plan
    assert "an extrapolation" in plan
    assert "measured on" in plan
