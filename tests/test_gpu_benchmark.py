"""`make gpu` without a GPU: every step says why it is skipped; and on a CPU the steps' own code runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
STEPS = ("machine", "ceilings", "parity", "experts", "low_precision", "fp8_linear", "training")
NOTHING = 2


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, str(BENCHMARKS / arguments[0]), *arguments[1:]]
    return subprocess.run(line, capture_output=True, text=True, check=False, env=os.environ | environment)


def on_cpu(step: str) -> dict[str, Any]:
    ended = run(f"on_gpu/{step}.py", STEPS_ON="cpu")
    assert ended.returncode == 0, ended.stderr
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, on which the steps run")
def test_every_step_is_skipped_with_its_reason(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    ended = run("gpu.py", f"--output={output}")
    assert ended.returncode == NOTHING, ended.stderr
    steps = json.loads(output.read_text())["steps"]
    assert tuple(steps) == STEPS
    assert {(each["status"], each["why"]) for each in steps.values()} == {("skipped", "no CUDA device")}


def test_a_step_that_fails_or_hangs_takes_no_other_with_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu

    monkeypatch.setattr(gpu, "SCRIPTS", tmp_path)
    monkeypatch.setattr(gpu, "STEPS", {"dies": 20, "hangs": 1, "works": 20, "lacks": 20})
    (tmp_path / "dies.py").write_text("raise SystemExit('the card fell off')")
    (tmp_path / "hangs.py").write_text("import time; time.sleep(60)")
    (tmp_path / "works.py").write_text("print('noise'); print('{\"tflops\": 1}')")
    (tmp_path / "lacks.py").write_text("import sys; print('no such package'); sys.exit(3)")
    output = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu.py", f"--output={output}", "--only", *gpu.STEPS])
    assert gpu.main() == 1
    found = json.loads(output.read_text())["steps"]
    assert {name: each["status"] for name, each in found.items()} == {
        "dies": "failed",
        "hangs": "out of time",
        "works": "done",
        "lacks": "skipped",
    }
    assert found["dies"]["why"] == "the card fell off"
    assert found["works"]["found"] == {"tflops": 1}
    assert found["lacks"]["why"] == "no such package"


@pytest.mark.slow
def test_kernels_are_compared_with_the_reference() -> None:
    found = on_cpu("parity")
    assert {case.split()[0] for case in found} >= {"loop", "fused", "grouped_mm", "emulated"}
    assert found["megablocks float32"].startswith("refused")


@pytest.mark.slow
def test_kernels_are_timed() -> None:
    found = on_cpu("experts")
    assert found["E2G2T2 32 loop"].endswith("of dense")


@pytest.mark.slow
def test_the_emulator_is_compared_with_torch() -> None:
    found = on_cpu("low_precision")
    assert found["torch._scaled_mm"].endswith("from the emulator")
    assert {value for name, value in found.items() if name != "torch._scaled_mm"} == {"as on the CPU"}


@pytest.mark.slow
def test_a_short_run() -> None:
    assert set(on_cpu("training")) == {"bfloat16", "fp8_current"}
