"""Finds where a model's values stop being finite."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from upcycle.errors import TrainingError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from upcycle.distributed.ranks import Ranks


def not_finite(
    model: PreTrainedModel, inputs: dict[str, Tensor], *, loss: float, step: int, ranks: Ranks
) -> TrainingError:
    """Run the model again and name the first module whose output, or whose weight, is not finite.

    Every rank has to call it; all get the error of the first whose loss is not finite.

    Args:
        model: the model.
        inputs: of the forward pass that gave the loss.
        loss: the loss of this rank.
        step: number of the optimizer step, from 1.
        ranks: the processes that train together.
    """
    of_ranks: list[tuple[float, str | None]] = ranks.gather((loss, _first(model, inputs)))
    rank, (loss, module) = next(each for each in enumerate(of_ranks) if not math.isfinite(each[1][0]))
    where = "the loss itself: every module's output is finite"
    if module:
        weight = next(filter(None, ranks.gather(_bad_weight(model.get_submodule(module)))), None)
        where = f"{module} (its {weight} is not finite)" if weight else module
    return TrainingError(
        "the loss is not finite",
        found=f"{loss} at step {step}{f' on rank {rank}' if ranks.size > 1 else ''}, first in {where}",
        remedy="lower schedule.peak or optim.clip, and start again with overwrite=true",
    )


@torch.no_grad()
def _first(model: PreTrainedModel, inputs: dict[str, Tensor]) -> str | None:
    """The first module whose output is not finite on this rank."""
    found: list[str] = []

    def watch(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if not found and isinstance(first, Tensor) and not _finite(first):
                found.append(name)

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        model(**inputs, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def _bad_weight(module: nn.Module) -> str | None:
    """A parameter of its own of which this rank holds what is not finite."""
    return next((name for name, value in module.named_parameters(recurse=False) if not _finite(value)), None)


def _finite(value: Tensor) -> bool:
    """Of what this rank holds: asking the others would wait for those that do not ask."""
    return bool((value.to_local() if isinstance(value, DTensor) else value).isfinite().all())
