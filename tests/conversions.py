"""Requests, conversions and comparisons that the tests share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from models import token_ids
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from upcycle.config import ConvertConfig, InitConfig, MoeConfig
from upcycle.convert import convert

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor, nn

    from upcycle.plan.plan import Plan
    from upcycle.prepare import Conversion

ROUTER_ORDERS = ("softmax_topk", "topk_softmax")
# Softmax-then-topK weighs groups by their probability, which a router of this standard deviation keeps within about
# 1e-4 of 1/E; much smaller ones let two groups tie in float32 now and then, which would break both.
ROUTER_STD = 2e-5


def options(source: Path | str, output: Path | str, *, init: str = "virtual_group", **changes: Any) -> ConvertConfig:
    """Options of `convert`: E4G2T2, and what is named; names of `moe.*` and `init.*` are given without the prefix."""
    moe = MoeConfig(
        expansion=4, granularity=2, top_k=2, router_order="softmax_topk", shared_experts=0, layers="all"
    )
    start = InitConfig(name=init, scaling="exact", router_std=ROUTER_STD, ratio=0.5, std=0.1)
    config = ConvertConfig(
        source=str(source),
        output=str(output),
        target="auto",
        dtype="auto",
        seed=0,
        max_shard_size="5GB",
        calibration_tokens=64,
        moe=moe,
        init=start,
        overwrite=False,
        resume=False,
    )
    for part in ("moe", "init"):
        named = {name: changes.pop(name) for name in list(changes) if name in getattr(config, part).__dict__}
        config = replace(config, **{part: replace(getattr(config, part), **named)})
    return replace(config, **changes)


@dataclass(frozen=True, kw_only=True)
class Converted:
    """An output and the plan that made it."""

    directory: Path
    plan: Plan

    def logits(self) -> Tensor:
        return logits(self.directory)

    def tensors(self) -> dict[str, Tensor]:
        return read_tensors(self.directory)


def run(config: ConvertConfig) -> Converted:
    """Convert, and keep the plan."""
    seen: list[Conversion] = []

    def on_plan(conversion: Conversion) -> Callable[[int], None]:
        seen.append(conversion)
        return lambda _count: None

    directory = convert(config, on_plan=on_plan)
    return Converted(directory=directory, plan=seen[0].plan)


def load(directory: Path, **arguments: Any) -> nn.Module:
    """A checkpoint through plain transformers, in float32, refusing missing, unexpected and mismatched tensors."""
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, output_loading_info=True, **{"dtype": torch.float32, **arguments}
    )
    problems = {kind: found for kind, found in info.items() if found}
    assert not problems, problems
    return model.eval()


def logits(directory: Path) -> Tensor:
    """Logits of the test sequences in float32."""
    with torch.inference_mode():
        return load(directory, experts_implementation="eager")(token_ids()).logits


def gap(found: Tensor, dense: Tensor) -> float:
    """Largest difference of two models' logits, which are of order 1."""
    return float((found - dense).abs().max())


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint."""
    return {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()}


def edit(directory: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of a one-file checkpoint in place."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
