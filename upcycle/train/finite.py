"""Finds where a model's values stop being finite."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from upcycle.errors import TrainingError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@torch.no_grad()
def first_not_finite(model: PreTrainedModel, inputs: dict[str, Tensor], *, loss: float, step: int) -> TrainingError:
    """Run the model again and name the first module whose output, or whose weight, is not finite.

    Args:
        model: the model.
        inputs: of the forward pass that gave the loss.
        loss: the loss.
        step: number of the optimizer step, from 1.
    """
    found: list[str] = []

    def watch(name: str) -> Any:
        def hook(module: torch.nn.Module, _inputs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if not found and isinstance(first, torch.Tensor) and not first.isfinite().all():
                weights = [key for key, value in module.named_parameters(recurse=False) if not value.isfinite().all()]
                found.append(f"{name} (its {weights[0]} is not finite)" if weights else name)

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        model(**inputs, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    where = found[0] if found else "the loss itself: every module's output is finite"
    return TrainingError(
        "the loss is not finite",
        found=f"{loss} at step {step}, first in {where}",
        remedy="the last checkpoint is from before: lower schedule.peak or optim.clip, then go on from it",
    )
