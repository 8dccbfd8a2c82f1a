"""config.json says in the words of transformers 4 too what it says in today's."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import conversions
import pytest
import training
from conversions import options
from transformers import AutoConfig

from upcycle.train.config import ExportConfig
from upcycle.train.export import export

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytest_plugins = ("text_model",)

TOPK = {"router_order": "topk_softmax"}
NATIVE = [
    ("llama", {}),
    ("llama_tied", {}),  # a scaled rotary embedding
    ("llama_tied", TOPK),
    ("mistral_full", TOPK),
    ("qwen3", {}),
    ("qwen3_one_head", {}),
    ("olmo2", {}),
    ("llama_attention_bias", TOPK),
]


@pytest.mark.parametrize(("name", "asked"), NATIVE)
def test_old_words(name: str, asked: dict[str, str], dense: Callable[[str], Path], tmp_path: Path) -> None:
    done = conversions.run(options(dense(name), tmp_path / "moe", **asked))
    raw = json.loads((done.directory / "config.json").read_text())
    rope = AutoConfig.from_pretrained(dense(name)).rope_parameters
    assert raw["rope_theta"] == rope["rope_theta"]
    scaled = {key: value for key, value in rope.items() if key != "rope_theta"}
    assert raw.get("rope_scaling") == (scaled if rope["rope_type"] != "default" else None)
    assert (raw.get("num_experts") == 8) == (done.plan.target not in ("mixtral", "granitemoeshared"))
    read = AutoConfig.from_pretrained(done.directory)
    assert read.rope_parameters == rope

    for old in ("rope_theta", "rope_scaling", *(["num_experts"] if "num_local_experts" in raw else [])):
        raw.pop(old, None)
    (done.directory / "config.json").write_text(json.dumps(raw))
    assert AutoConfig.from_pretrained(done.directory).to_diff_dict() == read.to_diff_dict()


def test_an_export_says_so_too(text: Path, text_model: Path, tmp_path: Path) -> None:
    made = ("model=upcycle", f"source='{text_model}'", *training.SMALL_MOE, "budget.steps=1")
    training.run(training.options(text, tmp_path / "run", *made))
    asked = {"run": str(tmp_path / "run"), "output": str(tmp_path / "out"), "checkpoint": "last"}
    directory = export(ExportConfig(**asked, dtype="float32", overwrite=False))
    raw = json.loads((directory / "config.json").read_text())
    assert raw["rope_theta"] == raw["rope_parameters"]["rope_theta"] == 10000.0
    assert "rope_scaling" not in raw


def test_the_generic_config_has_no_default_to_compare_with(dense: Callable[[str], Path], tmp_path: Path) -> None:
    """Some versions of transformers build one to print a config, unless the class says that there is none."""
    done = conversions.run(options(dense("gpt2"), tmp_path / "moe"))
    config = AutoConfig.from_pretrained(done.directory)
    assert config.has_no_defaults_at_init
    assert '"model_type": "upcycled_moe"' in repr(config)
    assert "rope_theta" not in json.loads((done.directory / "config.json").read_text())
