"""What the tests of training share: options as the command composes them, runs, and what is left of them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch import Callback

from upcycle.options.arguments import CONF, typed_options
from upcycle.train.config import TrainConfig
from upcycle.train.run import train

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from upcycle.train.prepared import Run

SMALL_MOE = ("moe.expansion=2", "moe.granularity=2", "moe.top_k=2")
# What differs between two runs that did the same.
TIMES = ("time", "train/step_seconds", "train/tokens_per_second")


class At(Callback):
    """Does something after so many optimizer steps."""

    def __init__(self, step: int, action: Any) -> None:
        self._step, self._action = step, action

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self._step:
            self._step = -1
            self._action()


def fail() -> None:
    raise RuntimeError("pulled the plug")


def overrides(text: Path) -> list[str]:
    """A run of a few seconds: 6 steps of 4 sequences of 32 tokens, in two micro-batches."""
    return [
        "data=text",
        f"data.files='{text}/*.txt'",
        "data.held_out=2",
        f"data.cache_dir='{text.parent}/cache'",
        "sequence_length=32",
        "batch.sequences=4",
        "batch.micro=2",
        "schedule.peak=1e-2",
        "validation.every=3",
        "validation.windows=4",
        "log_every=1",
        "checkpoint_every=2",
        "progress=false",
        "budget.steps=6",
    ]


def options(text: Path, output: Path, *changes: str) -> TrainConfig:
    """Options of such a run, with changes."""
    given = [f"output='{output}'", *overrides(text), *changes]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return typed_options(TrainConfig, compose("train", overrides=given))


def run(config: TrainConfig, callbacks: Sequence[Callback] = ()) -> Run:
    """Train."""
    return train(config, on_start=lambda _run: list(callbacks))


def rows(directory: Path) -> list[dict[str, Any]]:
    """The record of a run, without what two runs that did the same do not share."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in TIMES} for line in lines]


def checkpoint(directory: Path, name: str = "last") -> dict[str, Any]:
    """A checkpoint's content."""
    content: dict[str, Any] = torch.load(directory / "checkpoints" / f"{name}.ckpt", weights_only=True)
    return content


def differing_tensors(one: Any, other: Any, path: str = "") -> list[str]:
    """Paths at which two nested structures hold different tensors, bit for bit."""
    if isinstance(one, torch.Tensor):
        return [] if torch.equal(one, other) else [path]
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        return [each for key in one for each in differing_tensors(one[key], other[key], f"{path}/{key}")]
    if isinstance(one, list | tuple):
        assert len(one) == len(other), path
        return [
            each
            for i, (a, b) in enumerate(zip(one, other, strict=True))
            for each in differing_tensors(a, b, f"{path}/{i}")
        ]
    return []
