"""Which matrices belong to what, in every family and type."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import conversions
import models
import pytest
from torch import nn
from transformers.pytorch_utils import Conv1D

from upcycle.models.moe import describe_moe
from upcycle.precision.sites import SITES, matrices

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# Family and type, with what the layer of a mixture has beside its experts.
MIXTURES = {
    "llama-mixtral": ("llama", {"target": "mixtral", "router_order": "topk_softmax"}),
    "llama-qwen2_moe": ("llama", {"target": "qwen2_moe", "shared_experts": 1}),
    "llama-granitemoeshared": (
        "llama",
        {"target": "granitemoeshared", "shared_experts": 1, "router_order": "topk_softmax"},
    ),
    "qwen3-qwen3_moe": ("qwen3", {"target": "qwen3_moe", "layers": "every_2"}),
    "gpt2-upcycled_moe": ("gpt2", {"target": "upcycled_moe", "shared_experts": 1}),
    "nemotron_h-nemotron_h": ("nemotron_h", {"target": "nemotron_h", "router_order": "auto", "router_std": 0.02}),
    "nemotron_h-upcycled_moe": ("nemotron_h", {"target": "upcycled_moe", "router_order": "auto", "router_std": 0.02}),
}


@pytest.mark.parametrize("name", models.ONE_PER_FAMILY)
def test_every_linear_layer_of_a_dense_model_belongs_to_something(name: str) -> None:
    model = models.build(name)
    found = list(matrices(model, None))  # type: ignore[arg-type]
    linear = {
        each
        for each, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and "lm_head" not in each
    }
    assert {each.name for each in found} == linear
    ffn = {each.layer for each in found if each.site == "ffn"}
    assert ffn == set(models.ffn_layers(name))
    assert {each.site for each in found} <= set(SITES)
    assert all(model.get_submodule(each.name) is each.module for each in found)


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures(name: str, dense: Callable[[str], Path], tmp_path: Path) -> None:
    family, changes = MIXTURES[name]
    directory = conversions.run(conversions.options(dense(family), tmp_path / "moe", **changes)).directory
    moe, model = describe_moe(directory), conversions.load(directory)
    found = list(matrices(model, moe))  # type: ignore[arg-type]
    count = Counter(each.site for each in found)
    assert [each.name for each in found if each.site == "experts"] == [moe.experts_path(layer) for layer in moe.layers]
    assert (count["shared"] > 0) == (moe.shared_width > 1)  # nemotron_h has one of width 1 where none is asked for
    assert (count["ffn"] > 0) == ("layers" in changes)
    names = {each.name for each in found}
    left = {
        each
        for each, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and each not in names and "lm_head" not in each
    }
    empty = "shared_experts." if moe.shared_width == 1 else "gate"
    assert all(each.endswith(("gate", "latent_proj")) or empty in each for each in left)


def test_what_routes_is_never_in_low_precision(dense: Callable[[str], Path], tmp_path: Path) -> None:
    options = conversions.options(dense("llama"), tmp_path / "moe", target="qwen2_moe", shared_experts=1)
    directory = conversions.run(options).directory
    moe, model = describe_moe(directory), conversions.load(directory)
    named = {each.name for each in matrices(model, moe)}  # type: ignore[arg-type]
    assert any(name.endswith("shared_expert_gate") for name, _ in model.named_modules())
    assert not any(name.endswith(("gate", "lm_head", "embed_tokens")) for name in named)
