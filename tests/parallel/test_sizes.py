"""Sizes derived from a conversion against what the conversion counts, and published models against their papers."""

from __future__ import annotations

from dataclasses import replace

import models
import pytest
from conversions import options
from published import MODELS

from upcycle.convert.prepare import prepare
from upcycle.parallel.sizes import conversion_sizes

# What is left out of the others: biases and learned positions.
EXACT = {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "olmo2", "nemotron_h"}
REQUESTS = {
    "plain": {},
    "shared experts, one dense layer": {"shared_experts": 2, "layers": [1]},
    "top 4": {"top_k": 4},
    "latent": {"latent": 16},
}


@pytest.mark.parametrize("asked", REQUESTS)
@pytest.mark.parametrize("name", models.ONE_PER_FAMILY)
def test_sizes_count_what_the_conversion_counts(name, asked, dense, tmp_path):
    conversion = prepare(options(dense(name), tmp_path, target="upcycled_moe", **REQUESTS[asked]), execute=False)
    sizes, cost = conversion_sizes(conversion), conversion.cost
    assert sizes.forward_flops(sequence_length=0) == cost.flops_per_token
    if name in EXACT:
        assert sizes.parameters() == cost.parameters
    else:
        assert cost.parameters * 0.8 < sizes.parameters() < cost.parameters


@pytest.mark.parametrize("change", [{"tied": True}, {"qk_norm": "head"}, {"norms": 2}, {"top_k": 4}, {"moe_layers": 1}])
def test_a_wrong_size_is_noticed(dense, tmp_path, change):
    conversion = prepare(options(dense("llama"), tmp_path, target="upcycled_moe"), execute=False)
    sizes, cost = replace(conversion_sizes(conversion), **change), conversion.cost
    counted = sizes.parameters(), sizes.forward_flops(sequence_length=0)
    assert counted != (cost.parameters, cost.flops_per_token)


@pytest.mark.parametrize(
    ("name", "billions", "active"),
    [
        ("Mixtral 8x22B", 141, 39),
        ("Mixtral 8x22B-G8T8", 141, 22),
        ("Qwen2-57B-A14B", 57, 14),
        ("Llama3-8x70B", 465, 127),
    ],
)
def test_published_models_have_their_parameters(name, billions, active):
    sizes = MODELS[name]
    assert round(sizes.parameters() / 1e9) == billions
    assert round((sizes.forward_flops(sequence_length=0) / 2 + sizes.vocab * sizes.hidden) / 1e9) == active


def test_flops_of_llama_3_as_published():
    """2412.09952, table 1: of a sequence of 8,192 tokens, forward and backward; MoE 1.6 times the dense model."""
    moe = MODELS["Llama 3 8B E8T2"]
    dense = replace(moe, moe_layers=0)
    flops = [3 * 8192 * sizes.forward_flops(sequence_length=8192) for sizes in (dense, moe)]
    assert [f"{count:.1e}" for count in flops] == ["4.7e+14", "7.5e+14"]
