"""MegaBlocks in a process of its own: Triton's interpreter has to be chosen before anything imports Triton."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SUITE = Path(__file__).with_name("on_triton.py")


def run_suite(interpret: str) -> None:
    """Run `on_triton.py`; where there is a GPU nothing in it is skipped."""
    environment = os.environ | {"TRITON_INTERPRET": interpret, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(SUITE)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert torch.cuda.is_available() != ("skipped" in ended.stdout), ended.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs natively instead")
def test_interpreted() -> None:
    run_suite("1")


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    run_suite("0")
