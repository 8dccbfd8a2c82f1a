"""The assertion of losslessness rejects every way in which a conversion could be wrong."""

from __future__ import annotations

import re

import conversions
import pytest
import torch
from conversions import TOLERANCE, assert_lossless, options

# Names and the place of the experts in native types of one tensor per expert, and in the stacked generic type.
GATE, UP = r"(\.w1|experts\.\d+\.gate_proj)\.weight$", r"(\.w3|experts\.\d+\.up_proj)\.weight$"
DOWN = r"(\.w2\.weight|experts\.\d+\.down_proj\.weight|experts\.down_proj)$"
GATE_UP, ROUTER, DOWN_BIAS = r"experts\.gate_up_proj$", r"\.gate\.weight$", r"experts\.down_proj_bias$"


def names(tensors, pattern):
    found = sorted(name for name in tensors if re.search(pattern, name))
    return sorted(found, key=lambda name: [int(part) if part.isdigit() else part for part in name.split(".")])


def wrong_scale(tensors):
    for name in names(tensors, DOWN):
        tensors[name] *= 1.05


def swapped_gate_and_up(tensors):
    for gate, up in zip(names(tensors, GATE), names(tensors, UP), strict=True):
        tensors[gate], tensors[up] = tensors[up], tensors[gate]
    for name in names(tensors, GATE_UP):
        tensors[name] = tensors[name].roll(tensors[name].shape[1] // 2, dims=1)


def dropped_shard(tensors):
    """Nothing of shard 0, in any copy."""
    for name in names(tensors, DOWN):
        if tensors[name].dim() == 3:
            tensors[name][::2] = 0
        elif int(re.search(r"experts\.(\d+)", name)[1]) % 2 == 0:
            tensors[name] *= 0


def shards_of_two_copies(tensors):
    """Rows of a group that are not tied: tokens take the same shard twice, or shards of two groups."""
    for name in names(tensors, ROUTER):
        tensors[name][1::2] *= -1


def shifted_bias(tensors):
    for name in names(tensors, DOWN_BIAS):
        tensors[name] = tensors[name].roll(1, dims=1)


MATRIX_MUTANTS = [wrong_scale, swapped_gate_and_up, dropped_shard, shards_of_two_copies]
CASES = [
    *[("llama", "softmax_topk", "qwen2_moe", mutant) for mutant in MATRIX_MUTANTS],
    *[("llama", "topk_softmax", "mixtral", mutant) for mutant in MATRIX_MUTANTS],
    *[("llama_biases", "softmax_topk", "upcycled_moe", mutant) for mutant in [*MATRIX_MUTANTS, shifted_bias]],
    *[("llama_biases", "topk_softmax", "upcycled_moe", mutant) for mutant in [*MATRIX_MUTANTS, shifted_bias]],
    ("olmo2", "softmax_topk", "flex_olmo", wrong_scale),  # a norm after the FFN hides it from the logits
]


@pytest.mark.parametrize(("name", "order", "target", "mutant"), CASES)
def test_mutant_is_rejected(name, order, target, mutant, dense, dense_outputs, tmp_path):
    done = conversions.run(options(dense(name), tmp_path / "moe", router_order=order, groups="free"))
    assert done.plan.target == target
    assert_lossless(done.directory, dense_outputs(name), TOLERANCE[order])
    before = done.directory.joinpath("model.safetensors").read_bytes()
    conversions.edit(done.directory, mutant)
    assert done.directory.joinpath("model.safetensors").read_bytes() != before
    with pytest.raises(AssertionError, match="differs by"):
        assert_lossless(done.directory, dense_outputs(name), TOLERANCE[order])


def test_a_missing_tensor_is_rejected(dense, tmp_path):
    done = conversions.run(options(dense("llama"), tmp_path / "moe"))
    conversions.edit(done.directory, lambda tensors: tensors.pop("model.layers.1.mlp.experts.3.down_proj.weight"))
    with pytest.raises((AssertionError, RuntimeError)):
        conversions.load(done.directory)


def test_tied_rows_are_tied_bit_for_bit(dense, tmp_path):
    done = conversions.run(options(dense("llama"), tmp_path / "moe", granularity=4, top_k=4))
    router = done.directory and conversions.read_tensors(done.directory)["model.layers.0.mlp.gate.weight"]
    groups = router.view(4, 4, -1)
    assert torch.equal(groups, groups[:, :1].expand_as(groups))
    assert len(groups[:, 0].unique(dim=0)) == 4
