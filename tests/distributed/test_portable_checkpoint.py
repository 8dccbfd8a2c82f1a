"""Ranks read a portable checkpoint as one process does: without its zeros, which are not trained."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import conversions
import models
import torch
import training
from launching import on_ranks
from transformers import AutoTokenizer

from upcycle.train.models import start_model

if TYPE_CHECKING:
    from pathlib import Path

pytest_plugins = ("text_model",)

LAYOUTS = {"fsdp": "parallel=fsdp", "ep": "parallel=ep"}


def test_every_rank_leaves_the_zeros_out(text: Path, text_model: Path, tmp_path: Path) -> None:
    dense = models.save(models.build("llama", vocab_size=300, tie_word_embeddings=True), tmp_path / "dense")
    AutoTokenizer.from_pretrained(text_model).save_pretrained(dense)
    portable = conversions.run(conversions.options(dense, tmp_path / "moe")).directory
    given = ("model=checkpoint", f"source='{portable}'")
    expected = start_model(training.options(text, tmp_path / "none", *given)).model.state_dict()
    jobs = []
    for name, layout in LAYOUTS.items():
        config = training.options(text, tmp_path / "none", *given, layout)
        jobs.append({"do": "start", "options": asdict(config), "file": str(tmp_path / f"{name}.pt")})
    on_ranks(2, jobs, tmp_path)
    for name in LAYOUTS:
        found = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        assert found.keys() == {key for key, value in expected.items() if value.numel()}
        assert [key for key in found if not torch.equal(found[key], expected[key])] == []
        assert not any(key.endswith("q_proj.bias") for key in found)
