"""AdamW with parameter groups: what is decayed, and whose learning rate is another."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch

from upcycle.distributed.gradients import mesh_of

if TYPE_CHECKING:
    from collections.abc import Hashable

    from torch import nn

    from upcycle.models.moe import MoeDescription
    from upcycle.train.config import OptimConfig


KINDS = ("matrices", "vectors", "routers", "experts", "expert_biases")


def adamw(model: nn.Module, moe: MoeDescription | None, config: OptimConfig, *, peak: float) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101), fused, over the parameters that are trained.

    Vectors (norms, biases) and routers are not decayed. Each group has `lr` = peak times its factor.

    Args:
        model: the model.
        moe: its shape; None for a dense model.
        config: the options.
        peak: learning rate at the schedule's peak.
    """
    return torch.optim.AdamW(
        parameter_groups(model, moe, config, peak=peak), betas=(config.beta1, config.beta2), eps=config.eps, fused=True
    )


def parameter_groups(
    model: nn.Module, moe: MoeDescription | None, config: OptimConfig, *, peak: float
) -> list[dict[str, Any]]:
    """One group for each kind of parameter, named; with several ranks, for each kind and each way of sharding it."""
    groups: dict[tuple[str, Hashable], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.numel():
            groups[_kind(name, parameter, moe), mesh_of(parameter)].append(parameter)
    factors = {"routers": config.router_lr, "experts": config.expert_lr, "expert_biases": config.expert_lr}
    decayed = ("matrices", "experts")
    return [
        {
            "name": name,
            "params": parameters,
            "lr": peak * factors.get(name, 1.0),
            "weight_decay": config.weight_decay if name in decayed else 0.0,
        }
        for (name, _), parameters in sorted(groups.items(), key=lambda group: KINDS.index(group[0][0]))
    ]


def _kind(name: str, parameter: nn.Parameter, moe: MoeDescription | None) -> str:
    layers = (*moe.layers, *moe.ahead_layers) if moe else ()
    if moe and any(name.startswith(moe.router_path(layer) + ".") for layer in layers):
        return "routers"
    if moe and any(name.startswith(moe.experts_path(layer) + ".") for layer in layers):
        return "expert_biases" if name.endswith("bias") else "experts"
    return "matrices" if parameter.dim() > 1 else "vectors"
