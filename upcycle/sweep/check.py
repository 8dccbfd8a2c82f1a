"""Checks the options of a run and counts what it takes, from shapes alone: no weight and no text is read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from upcycle.distributed.quiet import only_warnings
from upcycle.distributed.ranks import Launch, layout_of
from upcycle.models.source import open_source
from upcycle.train.equip import equip
from upcycle.train.models import check_layout, start_model
from upcycle.train.run import check_batch, check_options

if TYPE_CHECKING:
    from upcycle.train.config import TrainConfig

# float32 weights and AdamW's two moments; last.ckpt and best.ckpt.
CHECKPOINT_BYTES_PER_PARAMETER = 2 * 12


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run takes.

    Attributes:
        model: its type and MoE shape.
        parameters: of the model.
        steps: optimizer steps.
        tokens: to train on.
        flops: training FLOPs.
        disk: bytes of its checkpoints.
    """

    model: str
    parameters: int
    steps: int
    tokens: int
    flops: int
    disk: int


def estimate(config: TrainConfig, *, ranks: int | None, execute: bool) -> Estimate:
    """Check a run as its start would, and count.

    Args:
        config: the options.
        ranks: processes that will train it together; None checks no layout.
        execute: whether it will run: the source's weights must be there.

    Raises:
        UpcycleError: anything wrong with the request or the source.
    """
    check_options(config)
    layout = layout_of(config.parallel, Launch(processes=ranks)) if ranks else None
    if layout:
        check_batch(config, layout.data)
    if execute and config.source is not None and config.model != "scratch":
        open_source(config.source)
    with only_warnings("upcycle"), torch.device("meta"):  # each run will log its reasons for its kernel
        start = start_model(_random(config))
        equipment = equip(start, config)
    if layout:
        check_layout(start, layout)
    parameters = sum(parameter.numel() for parameter in start.model.parameters())
    return Estimate(
        model=" ".join([start.model.config.model_type, *([start.moe.name] if start.moe else [])]),
        parameters=parameters,
        steps=equipment.steps,
        tokens=equipment.steps * equipment.tokens_per_step,
        flops=equipment.steps * equipment.flops_per_step,
        disk=CHECKPOINT_BYTES_PER_PARAMETER * parameters,
    )


def _random(config: TrainConfig) -> TrainConfig:
    """The run from random weights of the same shapes, which on the meta device take no memory."""
    if config.model == "upcycle":
        return replace(config, model="scratch")
    if config.model == "dense" and config.source is not None:
        architecture = open_source(config.source, need_weights=False).model.config.to_dict()
        return replace(config, model="scratch", architecture=architecture)
    return config
