"""The block for multi-token prediction of a model that is to be trained: where it comes from, or that there is none."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from upcycle.arch.family import describe
from upcycle.convert.materialise import Materialiser
from upcycle.errors import ConfigError, SourceError
from upcycle.models.ahead import attach, detach, load_block, stored_tensors, tells_of_block
from upcycle.models.moe import ahead_layers
from upcycle.plan.ahead import MADE, ahead_family, block_kinds, block_tensors
from upcycle.plan.parts import Whole
from upcycle.plan.tensors import TargetTensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from upcycle.distributed.ranks import Ranks
    from upcycle.train.config import MtpConfig
    from upcycle.train.start import Start

STARTS = ("none", "keep", *MADE)
_log = logging.getLogger("upcycle")


def check_ahead_options(mtp: MtpConfig) -> None:
    """Check `mtp.*`.

    Raises:
        ConfigError: an unknown start, or a number out of range.
    """
    if mtp.start not in STARTS:
        raise ConfigError("unknown mtp.start", found=mtp.start, expected=", ".join(STARTS))
    if mtp.depths < 1:
        raise ConfigError("mtp.depths is out of range", found=mtp.depths, expected="1 or more")
    if not mtp.weight >= 0:
        raise ConfigError("mtp.weight must not be negative", found=mtp.weight)


def settle_ahead(start: Start, mtp: MtpConfig, ranks: Ranks, *, seed: int) -> Start:
    """Give the model the block that the options ask for, or say in its configuration that it has none.

    Returns:
        The same start, which knows the block's MoE layers.

    Raises:
        ConfigError: its family has no such layers, or nothing to copy; experts in a dense model's; several ranks.
        SourceError: the source's are to be kept, and there are none.
    """
    if mtp.start == "none":
        if detach(start.model):
            _log.warning("mtp.start=none: the layers for multi-token prediction are left out of what is trained")
        return start
    if ranks.size > 1:
        raise ConfigError(
            "multi-token prediction is trained by one process",
            found=f"mtp.start={mtp.start} on {ranks.size} ranks",
            remedy="set mtp.start=none",
        )
    if mtp.start == "keep":
        if not _attach_kept(start):
            raise SourceError(
                "mtp.start=keep needs a source with layers for multi-token prediction",
                found=str(start.origin),
                remedy="set mtp.start=copy or random",
            )
    else:
        _attach_new(start, mtp.start, seed)
    beyond = ahead_layers(start.model.config)
    if beyond and not start.moe:
        raise ConfigError(
            "the layers for multi-token prediction have experts, and a dense model has none to balance them with",
            found=f"mtp.start={mtp.start}, model={start.model.config.model_type}",
            remedy="set mtp.start=copy, random or none",
        )
    return replace(start, moe=replace(start.moe, ahead_layers=beyond)) if start.moe else start


def _attach_kept(start: Start) -> bool:
    """Give the model the block that it had where it comes from; whether it had one.

    A model without weights may come from nowhere: then its configuration alone says which.
    """
    if start.origin is not None:
        return load_block(start.model, start.origin) is not None
    told = start.model.device.type == "meta" and tells_of_block(start.model)
    if told:
        attach(start.model)
    return told


def _attach_new(start: Start, how: str, seed: int) -> None:
    """Give the model the block that `upcycle convert mtp=` makes of its layers."""
    model: PreTrainedModel = start.model
    family = ahead_family(model.config.model_type)
    block = attach(model, block_kinds(family, model.config.to_dict()))
    described = describe(family, model.config)
    own = {
        name: TargetTensor(name=name, shape=shape, dtype="F32", parts=(Whole(source=name),), kind="backbone")
        for name, shape in described.tensors().items()
    }
    moe = start.moe
    tied = {moe.target.layout.router: moe.granularity} if moe and moe.groups == "tied" else {}
    tensors = list(block_tensors(described, own, how, tied=tied, option="mtp.start"))
    if model.device.type != "meta":
        made = Materialiser(stored_tensors(model), seed)
        block.fill({each.name: made.tensor(each, torch.float32) for each in tensors})
