"""What a plan says of low precision: the matrices of training, their memory, and what padding costs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import conversions
import models
import pytest
import torch

from upcycle.models.config import load_config
from upcycle.models.moe import describe_moe
from upcycle.precision.config import QuantiseConfig
from upcycle.precision.install import install_precision
from upcycle.precision.planning import plan_precision

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from cli import Outcome

pytest_plugins = ("tiny",)
WIDE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4}


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    return models.save(models.build("qwen2", **WIDE), tmp_path / "dense")


def test_it_is_what_training_would_install(wide: Path, tmp_path: Path) -> None:
    made = conversions.options(wide, tmp_path / "moe", expansion=2, shared_experts=1)
    directory = conversions.run(made).directory
    moe, model, options = describe_moe(directory), conversions.load(directory), QuantiseConfig(last=0.25)
    plan = plan_precision(load_config(directory), moe, "mxfp8", options, tokens=1024)
    install_precision(model, moe, "mxfp8", options, seed=0)  # type: ignore[arg-type]
    low = [each for each in model.modules() if "forward" in vars(each) or hasattr(each, "_low_precision")]
    weights = [value for each in low for value in each.parameters(recurse=False) if value.dim() > 1]
    assert plan.parameters == (model.num_parameters(), sum(value.numel() for value in weights))
    assert [each.parameters > 0 for each in plan.layers] == [True, True, True, False]
    assert plan.layers[0].sites == {"experts": True, "attention": False, "shared": True}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bf16", 2),
        ("fp8_current", 4),
        ("fp8_block", 2 + 2 * (1 + 4 / 128)),
        ("mxfp8", 2 + 2 * (1 + 1 / 32)),
        ("nvfp4", 3.125),
    ],
)
def test_bytes(wide: Path, name: str, expected: float) -> None:
    """A weight in bfloat16, and its numbers and scales in two directions."""
    plan = plan_precision(load_config(wide), None, name, QuantiseConfig(), tokens=1024)
    assert plan.bytes_per_parameter == pytest.approx(expected)
    assert plan.padded == 0


def test_padding_is_what_random_routing_pads(wide: Path, tmp_path: Path) -> None:
    directory = conversions.run(conversions.options(wide, tmp_path / "moe", expansion=8)).directory
    moe, tokens = describe_moe(directory), 4096
    plan = plan_precision(load_config(directory), moe, "nvfp4", QuantiseConfig(), tokens=tokens)
    values = torch.Generator().manual_seed(0)
    loads = [torch.randint(moe.experts, (tokens * moe.top_k,), generator=values).bincount() for _ in range(200)]
    padded = torch.stack([(-load % 128).sum() for load in loads]).double().mean() / (tokens * moe.top_k)
    assert plan.padded == pytest.approx(float(padded), rel=0.05)


def test_the_command(wide: Path, upcycle: Callable[..., Outcome]) -> None:
    given = ("plan", f"source={wide}", "moe.expansion=2", "moe.granularity=2", "moe.top_k=2")
    shown = upcycle(*given, "precision=nvfp4", "quantise.first=1")
    assert shown.status == 0
    assert "precision nvfp4" in shown.out
    assert "x E2M1 1x16, W E2M1 16x16, dy E2M1 1x16, stochastic, rotated for dW" in " ".join(shown.out.split())
    found: dict[str, Any] = json.loads(upcycle(*given, "precision=mxfp8", "format=json").out)["precision"]
    assert found["operands"] == {"x": "E4M3 1x32", "W": "E4M3 1x32", "dy": "E4M3 1x32"}
    assert [each["sites"]["experts"] for each in found["layers"]] == [True] * 4
    upcycle(*given, "precision=fp9").refused("unknown precision", "nvfp4")
    upcycle(*given[:2], "moe.granularity=8", "precision=mxfp8").refused(
        "is not a multiple of 32", remedy="moe.granularity"
    )
