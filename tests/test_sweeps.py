"""The shipped sweeps: every arm is accepted, and the committed results are those of the arms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from omegaconf import OmegaConf

if TYPE_CHECKING:
    from collections.abc import Callable

    from cli import Outcome

pytest_plugins = ("tiny",)
ROOT = Path(__file__).parent.parent
ARMS: Any = OmegaConf.to_container(OmegaConf.load(ROOT / "sweeps/step0.yaml").sweep.arms)
ROWS = {row["case"]: row for row in json.loads((ROOT / "analysis/results/step0.json").read_text())["rows"]}
SMOLLM2 = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}


def test_the_results_are_those_of_the_arms() -> None:
    assert {case: row["options"] for case, row in ROWS.items()} == ARMS


@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_is_accepted(arm: str, tmp_path: Path, upcycle: Callable[..., Outcome]) -> None:
    """Planned from the config alone; the type, and whether it is lossless, are as measured."""
    (tmp_path / "config.json").write_text(json.dumps(SMOLLM2))
    planned = json.loads(upcycle("plan", f"source={tmp_path}", "format=json", *ARMS[arm]).out)
    assert planned["target"] == ROWS[arm]["model_type"]
    assert planned["lossless"] is (abs(ROWS[arm]["loss_gap"]) <= 1e-3)
