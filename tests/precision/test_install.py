"""Recipes in models: what is installed where, and what is refused."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import conversions
import models
import pytest
import torch

from upcycle.errors import ConfigError
from upcycle.kernels.select import install_kernel
from upcycle.models.moe import describe_moe
from upcycle.precision.config import QuantiseConfig
from upcycle.precision.install import check_precision, compute_dtype, install_precision, switched
from upcycle.precision.recipes import RECIPES
from upcycle.precision.sites import matrices

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from upcycle.models.moe import MoeDescription

WIDE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
REST = QuantiseConfig(rest="float32")


@pytest.fixture
def mixture(tmp_path: Path) -> tuple[nn.Module, MoeDescription]:
    dense = models.save(models.build("qwen3", **WIDE), tmp_path / "dense")
    directory = conversions.run(conversions.options(dense, tmp_path / "moe", expansion=2)).directory
    return conversions.load(directory), describe_moe(directory)


def installed(
    model: nn.Module, name: str = "fp8_current", moe: MoeDescription | None = None, **options: object
) -> None:
    install_precision(model, moe, name, QuantiseConfig(rest="float32", **options), seed=0)  # type: ignore[arg-type]


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = model(models.token_ids()).logits
    return output


@pytest.mark.parametrize("name", models.ONE_PER_FAMILY)
def test_every_family_computes_in_low_precision(name: str) -> None:
    """Something else than before, and not much; gradients reach every matrix."""
    model = models.build(name)
    before = logits(model)
    installed(model, "bf16", sites=["ffn", "attention"])
    after = logits(model)
    assert not torch.equal(before, after)
    assert (after - before).norm() < 0.05 * before.norm()
    model(models.token_ids()).logits.square().mean().backward()
    assert all(each.module.weight.grad is not None for each in matrices(model, None))  # type: ignore[arg-type]


def test_names_and_parameters_stay() -> None:
    model, untouched = models.build("gpt2"), models.build("gpt2")
    installed(model, "bf16")
    assert {name: value.shape for name, value in model.state_dict().items()} == {
        name: value.shape for name, value in untouched.state_dict().items()
    }


def test_experts_take_the_kernel_that_computes_so(
    mixture: tuple[nn.Module, MoeDescription], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    model, moe = mixture
    before = logits(model)
    installed(model, "nvfp4", moe)
    assert "precision nvfp4, emulated: 3 of 15 matrices or layers of experts (experts)" in caplog.text
    with pytest.raises(ConfigError, match=r"kernel=loop, experts in low precision[\s\S]*kernel=auto"):
        install_kernel(model, "loop", device=torch.device("cpu"), dtype=torch.float32)  # type: ignore[arg-type]
    choice = install_kernel(model, "auto", device=torch.device("cpu"), dtype=torch.float32)  # type: ignore[arg-type]
    assert choice.name == "emulated"
    assert not torch.allclose(logits(model), before, atol=1e-4)


def test_there_is_nothing_to_emulate_without_a_recipe(mixture: tuple[nn.Module, MoeDescription]) -> None:
    with pytest.raises(ConfigError, match="experts not in low precision"):
        install_kernel(mixture[0], "emulated", device=torch.device("cpu"), dtype=torch.float32)  # type: ignore[arg-type]


def test_layers_that_stay(mixture: tuple[nn.Module, MoeDescription]) -> None:
    """Left as they are, they compute what they did: with all but none left, the error is that of one layer."""
    model, moe = mixture
    install_kernel(model, "loop", device=torch.device("cpu"), dtype=torch.float32)  # type: ignore[arg-type]
    exact = logits(model)
    installed(model, "nvfp4", moe, first=1, last=0.2)
    install_kernel(model, "auto", device=torch.device("cpu"), dtype=torch.float32)  # type: ignore[arg-type]
    named = [name for name, module in model.named_modules() if hasattr(module, "_low_precision")]
    assert named == [moe.experts_path(1)]
    assert not torch.equal(logits(model), exact)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("nvfp4", {"sites": ["experts"]}, "some of what the model has: attention, ffn"),
        ("nvfp4", {"first": 2, "last": 0.3}, "no matrix of the model"),
        ("mxfp8", {"squares": True}, "fp8_block, nvfp4"),
    ],
)
def test_bad_options(name: str, options: dict[str, object], message: str) -> None:
    model = models.build("llama", **WIDE)
    with pytest.raises(ConfigError, match=message):
        installed(model, name, **options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("nvfp5", {}, r"unknown precision[\s\S]*nvfp4"),
        ("nvfp4", {"sites": ["experst"]}, r"unknown quantise.sites[\s\S]*experts"),
        ("nvfp4", {"first": -1}, "quantise.first is no number of layers"),
        ("nvfp4", {"last": 1.5}, "quantise.last is no number of layers"),
        ("mxfp8", {"squares": True}, "fp8_block, nvfp4"),
    ],
)
def test_bad_options_without_a_model(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_precision(name, QuantiseConfig(**options), compiled=False, ranks=1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "found"), [({"compiled": True, "ranks": 1}, "compile"), ({"compiled": False, "ranks": 2}, "2 ranks")]
)
def test_what_would_not_follow_a_recipe(given: dict[str, int], found: str) -> None:
    with pytest.raises(ConfigError, match=found):
        check_precision("fp8_current", REST, **given)  # type: ignore[arg-type]
    check_precision("bfloat16", REST, **given)  # type: ignore[arg-type]


def test_widths_that_do_not_divide() -> None:
    model = models.build("llama", hidden_size=32, intermediate_size=80)
    with pytest.raises(ConfigError, match=r"\[80, 32\][\s\S]*64 or 96 instead of 80[\s\S]*sites without ffn"):
        installed(model, "mxfp8")
    installed(model, "fp8_current")


def test_switches() -> None:
    off = switched(RECIPES["nvfp4"], QuantiseConfig(stochastic=False, hadamard=False, squares=False))
    assert (off.stochastic, off.hadamard, off.weight.block) == (False, False, (1, 16))
    assert switched(RECIPES["nvfp4"], QuantiseConfig()) == RECIPES["nvfp4"]
    assert switched(RECIPES["fp8_block"], QuantiseConfig(squares=False)).weight.block == (1, 128)


def test_the_rest() -> None:
    assert compute_dtype("float32", QuantiseConfig()) == torch.float32
    assert compute_dtype("bfloat16", QuantiseConfig()) == torch.bfloat16
    assert compute_dtype("mxfp8", QuantiseConfig()) == torch.bfloat16
    assert compute_dtype("mxfp8", REST) == torch.float32
