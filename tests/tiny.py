"""Plugin for the tests of the command: a tiny sharded Llama, copies of it to spoil, and `upcycle` in-process."""

from __future__ import annotations

import shutil
import sys
from typing import TYPE_CHECKING

import pytest
import torch
from cli import SHARD, SMALL, Outcome
from transformers import LlamaConfig, LlamaForCausalLM

from upcycle.cli import main

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

HIDDEN, WIDTH, LAYERS, VOCAB = 16, 24, 3, 64


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bfloat16 Llama with 24 neurons in each of 3 layers, in several safetensors files with an index."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("tiny") / "llama"
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory, max_shard_size="6KB")
    return directory


@pytest.fixture
def source(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama, to be spoilt."""
    return shutil.copytree(tiny_llama, tmp_path / "source")


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, empty."""
    directory = tmp_path / "work"
    directory.mkdir()
    monkeypatch.chdir(directory)
    return directory


@pytest.fixture
def upcycle(work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Runs `upcycle ARGUMENT …` in this process; it must leave the working directory as it was."""
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        before = sorted(work.iterdir())
        with monkeypatch.context() as patched:
            patched.setattr(sys, "argv", ["upcycle", *map(str, arguments)])
            try:
                main()
                status = 0
            except SystemExit as end:
                status = int(end.code or 0)
        assert sorted(work.iterdir()) == before
        printed = capsys.readouterr()
        return Outcome(status=status, out=printed.out, err=printed.err)

    return run


@pytest.fixture(scope="session")
def whole(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The conversion of the tiny Llama to E2G2T2 in many files, uninterrupted and by one process."""
    output = tmp_path_factory.mktemp("whole") / "output"
    line = ["upcycle", "convert", f"source={tiny_llama}", f"output={output}", *SMALL, SHARD]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", line)
        with pytest.raises(SystemExit) as ended:
            main()
    assert ended.value.code == 0
    assert len(list(output.glob("model-*"))) > 8
    return output
