"""The same source, config and seed give the same bytes, whatever the shard size."""

from __future__ import annotations

import json

import conversions
import pytest
import torch
from conversions import options

RANDOM = {"init": "drop", "ratio": 0.5}


def contents(directory):
    return {file.name: file.read_bytes() for file in sorted(directory.iterdir())}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("init", ["drop", "noise", "random"])
def test_same_request_same_bytes(name, init, dense, tmp_path):
    torch.manual_seed(1)
    one = conversions.run(options(dense(name), tmp_path / "one", init=init))
    torch.manual_seed(2)
    torch.randn(3)
    two = conversions.run(options(dense(name), tmp_path / "elsewhere" / "two", init=init))
    assert contents(one.directory) == contents(two.directory)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_shard_size_changes_no_tensor_and_no_manifest(name, dense, tmp_path):
    whole = conversions.run(options(dense(name), tmp_path / "whole", **RANDOM))
    expected = conversions.read_tensors(whole.directory)
    for size in ("100KB", "20KB", "1KB"):
        cut = conversions.run(options(dense(name), tmp_path / size, max_shard_size=size, **RANDOM))
        files = sorted(cut.directory.glob("*.safetensors"))
        assert len(files) > 1
        found = conversions.read_tensors(cut.directory)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
        weights = {"model.safetensors", "model.safetensors.index.json", *(file.name for file in files)}
        others = [{k: v for k, v in contents(done.directory).items() if k not in weights} for done in (whole, cut)]
        assert others[0] == others[1]
        conversions.load(cut.directory)


def test_shards_of_the_source_do_not_matter(dense, tmp_path):
    """`llama` is stored in several files; the same model in one gives the same tensors."""
    (tmp_path / "one_file").mkdir()
    tensors = conversions.read_tensors(dense("llama"))
    conversions.save_file(tensors, tmp_path / "one_file" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "one_file" / "config.json").write_bytes((dense("llama") / "config.json").read_bytes())
    sources = {"one": dense("llama"), "other": tmp_path / "one_file"}
    done = [conversions.run(options(source, tmp_path / name, **RANDOM)) for name, source in sources.items()]
    one, other = (conversions.read_tensors(each.directory) for each in done)
    assert all(torch.equal(one[key], tensor) for key, tensor in other.items())


def test_seed_changes_the_router_and_nothing_else_of_a_lossless_conversion(dense, tmp_path):
    zero, one = (
        conversions.read_tensors(conversions.run(options(dense("llama"), tmp_path / str(seed), seed=seed)).directory)
        for seed in (0, 1)
    )
    routers = {key for key in zero if key.endswith("mlp.gate.weight")}
    assert len(routers) == 2
    assert {key for key in zero if not torch.equal(zero[key], one[key])} == routers


def test_every_layer_has_its_own_router(dense, tmp_path):
    tensors = conversions.read_tensors(conversions.run(options(dense("llama"), tmp_path / "moe")).directory)
    routers = [tensor for key, tensor in tensors.items() if key.endswith("mlp.gate.weight")]
    assert not torch.equal(*routers)


def test_manifest_says_where_every_tensor_comes_from(dense, tmp_path):
    done = conversions.run(options(dense("llama"), tmp_path / "moe", **RANDOM))
    manifest = json.loads((done.directory / "upcycle_manifest.json").read_text())
    assert set(manifest["tensors"]) == set(conversions.read_tensors(done.directory))
    assert manifest["plan_sha256"] == done.plan.fingerprint()
    assert manifest["seed"] == 0
    assert {"output", "max_shard_size"}.isdisjoint(manifest["config"])
