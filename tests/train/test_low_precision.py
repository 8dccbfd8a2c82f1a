"""Training in low precision: every arm, exact resume, groups that stay tied."""

from __future__ import annotations

import os
import shutil
import signal
from typing import TYPE_CHECKING

import models
import pytest
import torch
import training

from upcycle.errors import ConfigError
from upcycle.init.rng import generator
from upcycle.precision.linear import Emulation

if TYPE_CHECKING:
    from pathlib import Path

    from upcycle.train.prepared import Run

pytest_plugins = ("text_model",)

REST = "quantise.rest=float32"
TIED = ("model=upcycle", *training.SMALL_MOE, "moe.groups=tied", REST)
GIVEN = (*TIED, "precision=nvfp4")


@pytest.fixture(scope="module")
def wide(text_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose widths the kernels of low precision could divide."""
    directory = models.save(
        models.build("llama", vocab_size=300, hidden_size=32, intermediate_size=64),
        tmp_path_factory.mktemp("wide") / "m",
    )
    for file in text_model.glob("*token*"):
        shutil.copy(file, directory)
    return directory


def run(text: Path, wide: Path, output: Path, *changes: str, stop: int | None = None) -> Run:
    config = training.options(text, output, f"source='{wide}'", *changes, "resume=auto")
    return training.run(config, [training.At(stop, lambda: os.kill(os.getpid(), signal.SIGTERM))] if stop else [])


@pytest.fixture(scope="module")
def uninterrupted(text: Path, wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("low") / "run"
    run(text, wide, output, *GIVEN)
    return output


def assert_same(one: Path, other: Path) -> None:
    for part in ("state_dict", "optimizer_states"):
        assert training.differing_tensors(training.checkpoint(one)[part], training.checkpoint(other)[part]) == []
    assert training.rows(one) == training.rows(other)


def test_it_resumes_bit_for_bit(text: Path, wide: Path, uninterrupted: Path, tmp_path: Path) -> None:
    run(text, wide, tmp_path / "run", *GIVEN, stop=3)
    assert training.checkpoint(tmp_path / "run")["global_step"] == 3
    run(text, wide, tmp_path / "run", *GIVEN)
    assert_same(tmp_path / "run", uninterrupted)


def test_rounding_that_depends_on_anything_else_is_noticed(
    text: Path, wide: Path, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mutant: random numbers that know nothing of the micro-batch."""
    monkeypatch.setattr(Emulation, "randomness", lambda self, tensor: generator(self._seed, tensor))
    run(text, wide, tmp_path / "run", *GIVEN)
    with pytest.raises(AssertionError):
        assert_same(tmp_path / "run", uninterrupted)


def test_groups_stay_tied(uninterrupted: Path) -> None:
    weights = training.checkpoint(uninterrupted)["state_dict"]
    routers = [value for name, value in weights.items() if name.endswith("mlp.gate.weight")]
    assert routers
    for rows_NH in routers:
        grouped = rows_NH.unflatten(0, (-1, 2))
        assert torch.equal(grouped[:, 0], grouped[:, 1])


@pytest.mark.parametrize("model", ["dense", "upcycle", "scratch"])
@pytest.mark.parametrize("precision", ["fp8_current", "mxfp8"])
def test_every_arm(text: Path, wide: Path, tmp_path: Path, model: str, precision: str) -> None:
    """It starts a little above its own full precision, and learns."""
    arm = (f"model={model}", *(training.SMALL_MOE if model != "dense" else ()), REST)
    run(text, wide, tmp_path / "exact", *arm, "budget.steps=1")
    run(text, wide, tmp_path / "low", *arm, f"precision={precision}")
    exact, low = (training.rows(tmp_path / name) for name in ("exact", "low"))
    losses = [row["val/loss"] for row in low if "val/loss" in row]
    assert low[0]["val/loss_unquantised"] == pytest.approx(exact[0]["val/loss"], rel=1e-6)  # of another kernel
    assert losses[0] != exact[0]["val/loss"]
    assert losses[0] == pytest.approx(exact[0]["val/loss"], rel=0.02)
    assert losses[-1] < losses[0]


def test_the_exact_start_survives(text: Path, wide: Path, tmp_path: Path) -> None:
    """Powers of two change no number of a format: the mixture's first loss is the dense model's in the same recipe."""
    first = {}
    for model in ("dense", "upcycle"):
        arm = (f"model={model}", "moe.expansion=4", "moe.granularity=1", "moe.top_k=1", "init.router_std=1e-6")
        run(text, wide, tmp_path / model, *arm, REST, "precision=fp8_block", "budget.steps=1")
        first[model] = training.rows(tmp_path / model)[0]["val/loss"]
    assert first["upcycle"] == pytest.approx(first["dense"], rel=1e-4)


def test_another_recipe_is_refused_by_name(text: Path, wide: Path, uninterrupted: Path) -> None:
    with pytest.raises(ConfigError, match=r"precision=mxfp8 \(was nvfp4\), quantise.hadamard=False \(was None\)"):
        run(text, wide, uninterrupted, *TIED, "precision=mxfp8", "quantise.hadamard=false")
