"""What convert wrote loads and generates in an environment where `upcycle` is not installed."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import conversions
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

GENERATE = """
import sys
sys.modules["upcycle"] = None  # importing it now raises ImportError
import torch
from transformers import AutoModelForCausalLM
ids = torch.tensor([[4, 5, 6, 7]])
texts = []
for directory in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    for cached in (True, False):
        made = model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=cached, eos_token_id=None)
        texts.append(made.tolist())
assert all(text == texts[0] for text in texts), texts
"""


@pytest.mark.parametrize(
    ("name", "target"),
    [("llama", "qwen2_moe"), ("olmo2", "flex_olmo"), ("llama", "upcycled_moe"), ("gpt2", "upcycled_moe")],
)
def test_dense_and_moe_generate_the_same(dense: Callable[[str], Path], tmp_path: Path, name: str, target: str) -> None:
    source = dense(name)
    request = conversions.options(source, tmp_path / "moe", target=target, granularity=1, top_k=1)
    moe = conversions.run(request).directory
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", GENERATE, str(source), str(moe)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=environment,
    )
    assert ended.returncode == 0, ended.stderr
