"""Measures, per layer, the router weight that the selected experts get on sample text, before anything is written."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from upcycle.errors import SourceError
from upcycle.init.experts import normal
from upcycle.init.rng import generator
from upcycle.modeling.selection_upcycled_moe import ExpertSelection, select_experts
from upcycle.models.load import ffn_modules, load_dense
from upcycle.models.text import sample_tokens
from upcycle.plan.experts import router_rows

if TYPE_CHECKING:
    from collections.abc import Mapping

    from upcycle.arch.moe import MoeShape
    from upcycle.models.source import DenseSource
    from upcycle.options.config import InitConfig


def measured_masses(
    source: DenseSource, moe: MoeShape, init: InitConfig, *, seed: int, tokens: int
) -> Mapping[int, float]:
    """Mean over tokens of the selected experts' softmax mass, with the router that the conversion will write.

    Loads the dense model whole, so it needs its memory. Text: the standard library's argparse.py.

    Args:
        source: the dense model.
        moe: the request; softmax-then-topK.
        init: how the router starts.
        seed: seed of the conversion.
        tokens: tokens to measure on.

    Returns:
        layer -> mass in (0, 1].

    Raises:
        SourceError: a layer without such a mass: its inputs are not finite, or so large that the softmax overflows.
    """
    model = load_dense(source)
    modules = ffn_modules(model, source.model.ffn_module(), moe.layers)
    masses: dict[int, list[Tensor]] = {layer: [] for layer in modules}
    selection = ExpertSelection(top_k=moe.top_k, order=moe.router_order, granularity=moe.granularity, groups=moe.groups)

    def watch(layer: int, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        router = _router(source, moe, init, layer, seed)

        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            weights, _ = select_experts(args[0].float().flatten(0, -2) @ router.T, selection)
            masses[layer].append(weights.sum(-1))

        return module.register_forward_pre_hook(hook)

    handles = [watch(layer, module) for layer, module in modules.items()]
    with torch.inference_mode():
        for ids in torch.split(sample_tokens(source, tokens=tokens), source.model.sizes["P"]):
            model(input_ids=ids[None])
    for handle in handles:
        handle.remove()
    measured = {layer: float(torch.cat(each).mean()) for layer, each in masses.items()}
    without = [layer for layer, mass in measured.items() if not 0 < mass <= 1 + 1e-3]
    if without:
        raise SourceError(
            "the router's weight cannot be measured for init.scaling=calibrated",
            found=", ".join(f"{measured[layer]:g} in layer {layer}" for layer in without[:5]),
            expected="the mean weight of the selected experts, above 0",
            remedy="set init.scaling=exact, which measures nothing",
        )
    return measured


def _router(source: DenseSource, moe: MoeShape, init: InitConfig, layer: int, seed: int) -> Tensor:
    row = router_rows(source.model, moe, init, layer)
    return torch.cat(list(normal(row.rows, row.cols, std=row.std, repeat=row.repeat, values=generator(seed, row.key))))
