"""The counted costs against what transformers, the file system and torch's own FLOP counter say."""

from __future__ import annotations

from dataclasses import replace

import conversions
import models
import pytest
import torch
from conversions import options
from torch.utils.flop_counter import FlopCounterMode

from upcycle.convert.prepare import prepare

REQUESTS = {
    "plain": {},
    "shared": {"shared_experts": 3},
    "two_groups_in_one_layer": {"top_k": 4, "layers": [1]},
    "generic": {"target": "upcycled_moe", "expansion": 3, "granularity": 3, "top_k": 3},
    "normalised": {"router_order": "topk_softmax"},
    "latent": {"target": "upcycled_moe", "latent": 16},
    "for_transformers_alone": {"portable": False},
}
# Products with weights. What is left out is attention: its own operator, or batched products.
WITH_WEIGHTS = (torch.ops.aten.mm, torch.ops.aten.addmm)


def counted_flops(directory):
    """FLOPs per token of products with weights, by torch's counter."""
    model, ids = conversions.load(directory), models.token_ids()
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(ids)
    counts = counter.get_flop_counts()["Global"]
    return sum(counts.get(operator, 0) for operator in WITH_WEIGHTS) / ids.numel()


@pytest.mark.parametrize("asked", REQUESTS)
@pytest.mark.parametrize("name", models.ONE_PER_FAMILY)
def test_costs_are_those_of_the_real_model(name, asked, dense, tmp_path):
    config = options(dense(name), tmp_path / "moe", **REQUESTS[asked])
    found = prepare(config, execute=False).cost
    done = conversions.run(config)
    model, moe = conversions.load(dense(name)), conversions.load(done.directory)
    assert found.dense_parameters == model.num_parameters()
    assert found.parameters + found.padding_parameters == moe.num_parameters()
    stored = conversions.read_tensors(done.directory).values()
    assert found.bytes_to_write == sum(tensor.nbytes for tensor in stored)
    assert found.dense_flops_per_token == counted_flops(dense(name))
    assert found.flops_per_token + found.padding_flops_per_token == counted_flops(done.directory)


def test_what_is_not_trained_is_counted_apart(dense, tmp_path):
    """A tied Llama as qwen2_moe: zeros, products with them, and a head that is stored twice."""
    asked = {"source": dense("llama_tied"), "output": tmp_path / "moe"}
    portable, alone = (prepare(options(**asked, portable=each), execute=False).cost for each in (True, False))
    biases, shared = models.HIDDEN + 2 * models.HIDDEN // 2, 3 * 32 * models.HIDDEN
    assert portable.padding_parameters == models.LAYERS * (biases + shared)
    assert portable.padding_flops_per_token == 2 * models.LAYERS * shared
    assert portable.padding_bytes == 4 * (portable.padding_parameters + models.VOCAB * models.HIDDEN)
    assert portable.bytes_to_write == alone.bytes_to_write + portable.padding_bytes
    same = ("parameters", "active_parameters", "flops_per_token", "dense_flops_per_token")
    assert all(getattr(portable, name) == getattr(alone, name) for name in same)
    assert alone.padding_parameters == alone.padding_flops_per_token == alone.padding_bytes == 0


@pytest.mark.parametrize("name", models.ONE_PER_FAMILY)
def test_active_parameters_are_all_but_the_unselected_experts(name, dense, tmp_path):
    """E4G2T2: 2 of 8 experts, so 6/8 of the routed parameters rest."""
    done = conversions.run(options(dense(name), tmp_path / "moe", target="upcycled_moe"))
    found = prepare(options(dense(name), tmp_path / "other", target="upcycled_moe"), execute=False).cost
    experts = sum(t.numel() for key, t in conversions.read_tensors(done.directory).items() if ".experts." in key)
    assert found.active_parameters == found.parameters - experts * 6 // 8


@pytest.mark.parametrize("name", ["llama", "nemotron", "gpt2"])
def test_equal_flops_where_top_k_is_the_granularity(name, dense, tmp_path):
    """Only the router is added: H * N multiplications a layer."""
    found = prepare(options(dense(name), tmp_path / "moe", target="upcycled_moe"), execute=False).cost
    assert found.flops_per_token - found.dense_flops_per_token == 2 * models.LAYERS * models.HIDDEN * 8


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_bytes_follow_the_type(dtype, dense, tmp_path):
    config = options(dense("llama"), tmp_path / "moe", dtype=dtype)
    conversion = prepare(config, execute=False)
    done = conversions.run(replace(config, max_shard_size="30KB"))
    files = list(done.directory.glob("*.safetensors"))
    assert len(files) > 1
    headers = sum(8 + int.from_bytes(file.read_bytes()[:8], "little") for file in files)
    assert conversion.cost.bytes_to_write == sum(file.stat().st_size for file in files) - headers
    cost, size = conversion.cost, 4 if dtype == "float32" else 2
    gates = (4 - size) * models.LAYERS * models.HIDDEN if dtype == "float16" else 0  # float16 has no 2^-60
    assert cost.bytes_to_write == (cost.parameters + cost.padding_parameters) * size + gates
