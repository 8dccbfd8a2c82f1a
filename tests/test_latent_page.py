"""docs/latent.md: every command runs, and its table is the measured one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from documents import between, printed_by_commands

if TYPE_CHECKING:
    import pytest

pytest_plugins = ("text_model",)
ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs/latent.md").read_text()


def measured() -> str:
    """What `benchmarks/latent.py` found."""
    found = json.loads((ROOT / "benchmarks/results/latent.json").read_text())
    layers = ", ".join(map(str, found["layers"]))
    lines = [
        f"SmolLM2-135M-Instruct, fit on {found['fit_tokens']:,} tokens, tested on {found['test_tokens']:,} of "
        "argparse.py;",
        f"relative error of the FFN's output, mean over layers {layers} (and each):",
        "",
        "| directions | shared neurons | L = H/2 | L = H/4 |",
        "|---|---|---|---|",
    ]
    cells = {(row["bases"], row["shared"], row["reduction"]): row for row in found["rows"]}
    for bases, shared in dict.fromkeys((row["bases"], row["shared"]) for row in found["rows"]):
        rows = [cells[bases, shared, reduction] for reduction in (2, 4)]
        each = [", ".join(f"{error:.3f}" for error in row["errors"]) for row in rows]
        figures = [f"**{row['mean_error']:.3f}** ({listed})" for row, listed in zip(rows, each, strict=True)]
        lines.append(f"| {bases} | {shared} | {' | '.join(figures)} |")
    return "\n".join([*lines, "", "By `python benchmarks/latent.py`; of the FFN's 1,536 neurons.", ""])


def test_the_table_is_the_measured_one() -> None:
    assert between(TEXT, "measured") == measured()


def test_a_small_benchmark(text_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "latent.json"
    small = ["--layers", "0", "1", "--tokens", "256", "--shared", "0", "8", f"--source={text_model}"]
    line = [sys.executable, str(ROOT / "benchmarks/latent.py"), *small, f"--output={output}"]
    ran = subprocess.run(line, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(output.read_text())
    error = {(row["bases"], row["shared"], row["reduction"]): row["mean_error"] for row in found["rows"]}
    assert len(error) == 6
    assert all(error["whitened", 8, each] < error["whitened", 0, each] < error["plain", 0, each] for each in (2, 4))
    assert all(error[case, 0, 2] < error[case, 0, 4] for case in ("plain", "whitened"))


def test_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").symlink_to(ROOT / "models")
    printed = printed_by_commands(TEXT, monkeypatch, capsys)
    assert "lossless" in printed[0]
    report = json.loads((tmp_path / "latent-exact/equivalence.json").read_text())
    assert report["moe_loss"] == report["dense_loss"]
    manifest = json.loads((tmp_path / "latent-small/upcycle_manifest.json").read_text())
    assert 0 < max(manifest["latent"]["errors"].values()) < 0.5
    assert "routed experts compute in 48 dimensions" in printed[-1]
