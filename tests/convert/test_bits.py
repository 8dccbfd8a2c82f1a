"""What is stored, bit for bit: slices of the dense matrices times powers of two, and everything else as it was."""

from __future__ import annotations

import json
import math
import re

import conversions
import models
import pytest
import torch
from conversions import ROUTER_ORDERS, TOLERANCE, assert_lossless, options

EXPANSION, GRANULARITY = 4, 2
SHARD = models.WIDTH // GRANULARITY
TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def dense_matrices(name, tensors, layer):
    """Gate (or None), up and down of a layer as [out, in], by this test's own knowledge of each layout."""
    if name.startswith("gpt2"):
        stem = f"transformer.h.{layer}.mlp"
        return None, tensors[f"{stem}.c_fc.weight"].T, tensors[f"{stem}.c_proj.weight"].T
    hybrid = name.startswith("nemotron_h")
    stem = f"backbone.layers.{layer}.mixer" if hybrid else f"model.layers.{layer}.mlp"
    down = tensors[f"{stem}.down_proj.weight"]
    if name.startswith("phi3"):
        return *tensors[f"{stem}.gate_up_proj.weight"].chunk(2), down
    gate = None if name.startswith("nemotron") else tensors[f"{stem}.gate_proj.weight"]
    return gate, tensors[f"{stem}.up_proj.weight"], down


def moe_matrices(tensors, layer):
    """Gate (or None), up and down of all experts of a layer of `upcycled_moe`, [N, out, in]."""
    ending = re.compile(rf"\.{layer}\.(mlp|mixer)\.experts\.")
    found = {ending.split(name)[-1]: tensor for name, tensor in tensors.items() if ending.search(name)}
    gate, up = found["gate_up_proj"].chunk(2, dim=1) if "gate_up_proj" in found else (None, found["up_proj"])
    return gate, up, found["down_proj"]


def ratio(found, source):
    """The one factor between two tensors; every element must have it exactly."""
    factor = float(found.abs().max().double() / source.abs().max().double())
    assert torch.equal(found, source * factor)
    return factor


@pytest.fixture(scope="module")
def bfloat16(tmp_path_factory):
    """Returns a model of the table saved in bfloat16."""
    root = tmp_path_factory.mktemp("bfloat16")
    return lambda name: models.save(models.build(name), root / name, dtype=torch.bfloat16)


@pytest.mark.parametrize("order", ROUTER_ORDERS)
@pytest.mark.parametrize("name", models.MODELS)
def test_experts_are_slices_times_powers_of_two(name, order, bfloat16, tmp_path):
    source = bfloat16(name)
    done = conversions.run(options(source, tmp_path / "moe", target="upcycled_moe", router_order=order))
    dense, moe = conversions.read_tensors(source), conversions.read_tensors(done.directory)
    needed = EXPANSION * GRANULARITY**2 / 2 if order == "softmax_topk" else GRANULARITY  # E*G^2/T and G
    for layer in models.ffn_layers(name):
        gate, up, down = dense_matrices(name, dense, layer)
        gates, ups, downs = moe_matrices(moe, layer)
        for expert in range(EXPANSION * GRANULARITY):
            shard = slice(expert % GRANULARITY * SHARD, (expert % GRANULARITY + 1) * SHARD)
            factors = {"up": ratio(ups[expert], up[shard]), "down": ratio(downs[expert], down[:, shard])}
            assert all(math.frexp(factor)[0] == 0.5 for factor in factors.values()), factors
            degree = 2 if name.startswith("nemotron") else {"gpt2": None}.get(name, 1)
            assert factors["down"] * (factors["up"] ** degree if degree else 1) == needed
            assert factors["up"] == 1 or degree
            if gate is not None:
                assert torch.equal(gates[expert], gate[shard])


@pytest.mark.parametrize("name", models.MODELS)
def test_everything_else_is_kept_bit_for_bit(name, bfloat16, tmp_path):
    source = bfloat16(name)
    done = conversions.run(options(source, tmp_path / "moe", target="upcycled_moe", layers=[1]))
    dense, moe = conversions.read_tensors(source), conversions.read_tensors(done.directory)
    hybrid = f"model.layers.{models.ffn_layers(name)[1]}.mixer."
    families = {"gpt2": "transformer.h.1.mlp.", "nemotron_h": hybrid}
    ffn = families.get(models.MODELS[name]["model_type"], "model.layers.1.mlp.")
    in_memory = {re.sub(r"^backbone\.", "model.", key): tensor for key, tensor in dense.items()}
    kept = {key: tensor for key, tensor in in_memory.items() if not key.startswith(ffn)}
    found = {key.removeprefix("language_model."): tensor for key, tensor in moe.items()}
    assert all(torch.equal(found[key], tensor) and found[key].dtype == tensor.dtype for key, tensor in kept.items())
    assert all(key.startswith(ffn) for key in found.keys() - kept.keys())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llama_biases", "phi3", "gpt2", "nemotron"])
def test_conversion_to_a_smaller_type_equals_the_dense_model_in_it(name, dtype, dense, tmp_path):
    """Powers of two commute with rounding, so nothing is lost beyond what the dense model loses."""
    rounded = models.save(models.build(name), tmp_path / "rounded", dtype=TYPES[dtype])
    changes = {"dtype": dtype, "router_order": "topk_softmax"}
    done = conversions.run(options(dense(name), tmp_path / "moe", **changes))
    assert {tensor.dtype for tensor in conversions.read_tensors(done.directory).values()} == {TYPES[dtype]}
    assert json.loads((done.directory / "config.json").read_text())["dtype"] == dtype
    assert conversions.load(done.directory, dtype="auto").dtype == TYPES[dtype]
    assert_lossless(done.directory, conversions.outputs(rounded), TOLERANCE["topk_softmax"])


def test_a_smaller_type_widens_exactly(bfloat16, tmp_path):
    source = bfloat16("llama")
    done = conversions.run(options(source, tmp_path / "moe", dtype="float32", router_order="topk_softmax"))
    assert {tensor.dtype for tensor in conversions.read_tensors(done.directory).values()} == {torch.float32}
    assert_lossless(done.directory, conversions.outputs(source), TOLERANCE["topk_softmax"])


def test_a_layer_of_mixed_types_takes_the_wider_one(bfloat16, tmp_path):
    """A gate in float32 beside matrices in bfloat16 must not be rounded (found by this test: it was)."""
    source = bfloat16("llama")
    gate = "model.layers.0.mlp.gate_proj.weight"
    conversions.edit(source, lambda tensors: tensors.update({gate: tensors[gate].float() * 1.0001}))
    done = conversions.run(options(source, tmp_path / "moe", target="upcycled_moe", router_order="topk_softmax"))
    assert_lossless(done.directory, conversions.outputs(source), TOLERANCE["topk_softmax"])
    types = {key: tensor.dtype for key, tensor in conversions.read_tensors(done.directory).items() if "experts" in key}
    assert {dtype for key, dtype in types.items() if "layers.0" in key} == {torch.float32}
    assert {dtype for key, dtype in types.items() if "layers.1" in key} == {torch.bfloat16}
