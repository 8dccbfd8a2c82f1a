"""Counts a model's FLOPs from its modules' shapes; reads no weight."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import nn
from transformers.pytorch_utils import Conv1D

from upcycle.arch.mixing import mixing_flops
from upcycle.models.ahead import ahead_block

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from upcycle.models.moe import MoeDescription

# One forward pass, and twice as much for the gradients of inputs and of weights.
TRAINING_PASSES = 3


def forward_flops(model: PreTrainedModel, moe: MoeDescription | None, *, sequence_length: int) -> int:
    """Forward FLOPs per token: 2 for every weight that multiplies it, plus what mixes positions (`mixing_flops`).

    Routed experts count by the share of them that a token visits; norms, activations and the loss count nothing.

    Args:
        model: a dense or MoE causal LM.
        moe: its shape; None for a dense model.
        sequence_length: tokens per sequence.
    """
    block = ahead_block(model)
    linear = _linear_weights(model) - (_linear_weights(block) if block else 0)
    mixing = mixing_flops(model.config.get_text_config(), sequence_length=sequence_length)
    return 2 * (linear + (_moe_weights(model, moe) if moe else 0)) + mixing


def ahead_flops(model: PreTrainedModel, *, sequence_length: int, depths: int) -> int:
    """Forward FLOPs per token of a block for multi-token prediction and of the head that reads it; 0 without one."""
    block = ahead_block(model)
    if block is None:
        return 0
    alone = block.config
    experts = sum(each.numel() for name, each in block.named_parameters() if each.dim() == 3 and ".experts." in name)
    routers = sum(each.numel() for name, each in block.named_parameters() if name.endswith("gate.weight"))
    routed = routers + (experts * alone.num_experts_per_tok // alone.num_local_experts if experts else 0)
    head: nn.Module = model.get_output_embeddings()
    weights = _linear_weights(block) + routed + head.get_parameter("weight").numel()
    return depths * (2 * weights + mixing_flops(alone, sequence_length=sequence_length))


def _linear_weights(model: nn.Module) -> int:
    return sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear | Conv1D))


def _moe_weights(model: PreTrainedModel, moe: MoeDescription) -> int:
    routers = len(moe.layers) * moe.experts * moe.hidden_size
    stacked = sum(
        math.prod(parameter.shape)
        for layer in moe.layers
        for parameter in model.get_submodule(moe.experts_path(layer)).parameters()
        if parameter.dim() == 3
    )
    return routers + stacked * moe.top_k // moe.experts
