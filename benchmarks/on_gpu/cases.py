"""Experts for the steps: stacked weights as transformers has them, and random routing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


def make_experts(number: int, hidden: int, width: int, device: torch.device, dtype: torch.dtype) -> Any:
    """Gated experts whose outputs are of the size of their inputs."""
    config = MixtralConfig(hidden_size=hidden, intermediate_size=width, num_local_experts=number)
    config._experts_implementation = "eager"
    with torch.device(device):
        experts = MixtralExperts(config)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return experts.to(dtype)


def routed(tokens: int, experts: int, top_k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Indices and weights of random routing, [T, K]."""
    values = torch.Generator(device).manual_seed(0)
    weights, index = torch.randn(tokens, experts, device=device, generator=values).softmax(-1).topk(top_k)
    return index, weights


def gradients(forward: Callable[..., Tensor], experts: Any, x: Tensor, index: Tensor, weights: Tensor) -> list[Tensor]:
    """The output, and the gradients of inputs, weights and parameters."""
    x, weights = x.detach().requires_grad_(), weights.detach().requires_grad_()
    leaves = [x, weights, *experts.parameters()]
    output = forward(experts, x, index, weights)
    direction = torch.randn(output.shape, device=x.device, generator=torch.Generator(x.device).manual_seed(1))
    return [output.detach(), *torch.autograd.grad(output, leaves, direction.to(output))]
