"""Checkpoints are shards of any layout: another one goes on with them, and they are exported."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import pytest
import torch
import training
from conversions import load
from launching import on_ranks
from pydantic import TypeAdapter
from test_parity import COMMON, TYPES, assert_same

from upcycle.errors import ConfigError
from upcycle.train.checkpoints import read_checkpoint
from upcycle.train.config import ExportConfig, TrainConfig
from upcycle.train.export import export

if TYPE_CHECKING:
    from pathlib import Path

pytest_plugins = ("text_model",)
STEPS = 5
BEFORE = ("parallel=ep", "parallel.ep=2")  # on four ranks


def options(source: Path, text: Path, output: Path, *changes: str) -> dict[str, Any]:
    """Five steps of one micro-batch, whatever the ranks, with a checkpoint after every second."""
    given = (*COMMON, *TYPES["qwen2_moe"], f"source='{source}'", "batch.micro=null", f"budget.steps={STEPS}")
    changes = ("checkpoint_every=2", "log_every=5", "resume=auto", *changes)
    return asdict(training.options(text, output, *given, *changes))


@pytest.fixture(scope="session")
def place(text_model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that one process made, and that four ranks began and others ended: `alone`, `fewer`, `spread`, `stopped`."""
    root = tmp_path_factory.mktemp("resharding")
    begun = [
        {"do": "run", "options": options(text_model, text, root / name, *BEFORE), "stop_after": 3}
        for name in ("fewer", "spread", "stopped")
    ]
    spread = {"do": "run", "options": options(text_model, text, root / "spread", "parallel=ep")}
    on_ranks(4, [*begun, spread], root)
    on_ranks(2, [{"do": "run", "options": options(text_model, text, root / "fewer", "parallel=ep")}], root)
    training.run(TypeAdapter(TrainConfig).validate_python(options(text_model, text, root / "alone")))
    return root


@pytest.mark.parametrize("name", ["fewer", "spread"])
def test_another_layout_goes_on(name: str, place: Path) -> None:
    """Four ranks to two; experts over two ranks to over four. The row of the last step is about all five."""
    assert_same(place / name, place / "alone")


def test_exported(place: Path, tmp_path: Path) -> None:
    config = ExportConfig(
        run=str(place / "fewer"), output=str(tmp_path / "moe"), checkpoint="last", dtype="float32", overwrite=False
    )
    found = load(export(config)).state_dict()
    trained = read_checkpoint(place / "fewer/checkpoints/last.ckpt")["state_dict"]
    assert {f"model.{name}" for name in found} == set(trained)
    assert all(torch.equal(value, trained[f"model.{name}"]) for name, value in found.items())


def test_only_the_last_checkpoints_are_kept(place: Path) -> None:
    names = [each.name for each in (place / "spread/checkpoints").iterdir()]
    assert {"last.ckpt", "last.ckpt.5", "best.ckpt"} <= set(names)
    assert len(names) == 4  # and the best one's shards


def test_one_process_cannot_go_on_with_shards(place: Path, text_model: Path, text: Path) -> None:
    alone = TypeAdapter(TrainConfig).validate_python(options(text_model, text, place / "stopped"))
    with pytest.raises(ConfigError, match="started by several processes, and one is to go on"):
        training.run(alone)
