"""Cutting a checkpoint into files."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from upcycle.checkpoint import TensorSpec, index_json, layout_shards

SIZES = st.lists(st.tuples(st.sampled_from(["F32", "BF16", "BOOL"]), st.integers(0, 40)), min_size=1, max_size=30)


@given(sizes=SIZES, limit=st.integers(1, 200))
def test_every_tensor_once_in_order_within_the_limit(sizes, limit):
    specs = [TensorSpec(name=f"t{i}", dtype=dtype, shape=(n,)) for i, (dtype, n) in enumerate(sizes)]
    shards = layout_shards(specs, limit)
    assert [spec for shard in shards for spec in shard.tensors] == specs
    assert all(shard.nbytes <= limit or len(shard.tensors) == 1 for shard in shards)
    for shard, following in zip(shards, shards[1:], strict=False):
        assert shard.nbytes + following.tensors[0].nbytes > limit, "greedy: the next tensor would not have fitted"
    expected = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    assert [shard.file for shard in shards] == (expected if len(shards) > 1 else ["model.safetensors"])
    assert all(sorted(shard.stored_order(), key=str) == sorted(shard.tensors, key=str) for shard in shards)


def test_index():
    specs = [TensorSpec(name=name, dtype="BF16", shape=(3, 2)) for name in "ba"]
    index = index_json(layout_shards(specs, 12))
    assert json.loads(index) == {
        "metadata": {"total_size": 24},
        "weight_map": {"a": "model-00002-of-00002.safetensors", "b": "model-00001-of-00002.safetensors"},
    }
    assert index == index_json(layout_shards(specs, 12))


def test_no_tensors():
    assert layout_shards([], 1) == ()
