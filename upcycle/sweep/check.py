"""Checks the options of a run and counts what it takes, from shapes alone: no weight and no text is read."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from upcycle.kernels.select import install_kernel
from upcycle.routing.install import install_routers
from upcycle.source import open_source
from upcycle.train.fit import device_of
from upcycle.train.flops import TRAINING_PASSES, forward_flops
from upcycle.train.models import start_model
from upcycle.train.run import check_options, compute_dtype
from upcycle.train.schedule import budget_steps, check_schedule

if TYPE_CHECKING:
    from collections.abc import Iterator

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


def estimate(config: TrainConfig, *, execute: bool) -> Estimate:
    """Check a run as its start would, and count.

    Args:
        config: the options.
        execute: whether it will run: the source's weights must be there.

    Raises:
        UpcycleError: anything wrong with the request or the source.
    """
    check_options(config)
    config.data.sources()
    if execute and config.source is not None and config.model != "scratch":
        open_source(config.source)
    with _silently(), torch.device("meta"):
        start = start_model(_random(config))
        if start.moe:
            install_kernel(start.model, config.kernel, device=device_of(config), dtype=compute_dtype(config.precision))
            install_routers(start.model, start.moe, config.router, config.balance)
    tokens_per_step = config.batch.sequences * config.sequence_length
    per_token = TRAINING_PASSES * forward_flops(start.model, start.moe, sequence_length=config.sequence_length)
    per_step = tokens_per_step * per_token
    steps = budget_steps(config.budget, tokens_per_step=tokens_per_step, flops_per_step=per_step)
    check_schedule(config.schedule, steps=steps)
    parameters = sum(parameter.numel() for parameter in start.model.parameters())
    return Estimate(
        model=" ".join([start.model.config.model_type, *([start.moe.name] if start.moe else [])]),
        parameters=parameters,
        steps=steps,
        tokens=steps * tokens_per_step,
        flops=steps * per_step,
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


@contextmanager
def _silently() -> Iterator[None]:
    """Without the reasons for every arm's kernel: each run will log its own."""
    logger = logging.getLogger("upcycle")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
