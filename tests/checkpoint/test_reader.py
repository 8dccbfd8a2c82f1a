"""Reading safetensors and pickles: every layout, and every damaged or hostile input."""

from __future__ import annotations

import json
import logging
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, LlamaForCausalLM

from upcycle.checkpoint import has_weights, open_reader, read_index_names
from upcycle.errors import SourceError

INDEX = "model.safetensors.index.json"
TINY = {"vocab_size": 8, "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}


def write_sharded(directory: Path, tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    directory.mkdir(parents=True, exist_ok=True)
    weight_map = {name: f"model-{i % 2 + 1:05d}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({name: tensor for name, tensor in tensors.items() if weight_map[name] == file}, directory / file)
    write_index(directory, weight_map)
    return weight_map


def write_index(directory: Path, weight_map: dict[str, str], name: str = INDEX) -> None:
    (directory / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def check_equal(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    reader = open_reader(path)
    assert set(reader.tensors) == set(tensors)
    for name, tensor in tensors.items():
        info, read = reader.tensors[name], reader.read(name)
        assert read.dtype == tensor.dtype
        assert info.shape == tuple(tensor.shape)
        assert info.nbytes == tensor.nbytes
        assert info.file in reader.files
        assert torch.equal(read, tensor)


def test_single(single, tensors):
    check_equal(single, tensors)
    assert open_reader(single).files == (single / "model.safetensors",)
    assert read_index_names(single) is None


def test_values_are_mapped_not_copied(tmp_path):
    save_file({"w": torch.ones(8_000_000)}, tmp_path / "model.safetensors")

    def anonymous_kib():
        return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0])

    reader, before = open_reader(tmp_path), anonymous_kib()
    values = reader.read("w")
    assert values.sum() == 8_000_000
    assert anonymous_kib() - before < 8_000  # the tensor has 31,250 KiB


def test_sharded(tmp_path, tensors):
    weight_map = write_sharded(tmp_path, tensors)
    check_equal(tmp_path, tensors)
    assert [file.name for file in open_reader(tmp_path).files] == sorted(set(weight_map.values()))
    assert read_index_names(tmp_path) == tuple(tensors)


def test_index_names_need_no_weight_file(tmp_path):
    write_index(tmp_path, {"b": "x.safetensors", "a": "y.safetensors"})
    assert read_index_names(tmp_path) == ("b", "a")


def test_shards_without_an_index(tmp_path, tensors):
    names = list(tensors)
    save_file({name: tensors[name] for name in names[:2]}, tmp_path / "model-1.safetensors")
    save_file({name: tensors[name] for name in names[2:]}, tmp_path / "model-2.safetensors")
    save_file({"stray": torch.ones(1)}, tmp_path / "consolidated.safetensors")
    check_equal(tmp_path, tensors)
    save_file({names[0]: tensors[names[0]]}, tmp_path / "model-3.safetensors")
    with pytest.raises(SourceError, match=rf"two files hold the tensor {names[0]}\n.*model-1.safetensors and model-3"):
        open_reader(tmp_path)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickle(tmp_path, tensors, caplog, zipped):
    torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with caplog.at_level(logging.WARNING, "upcycle"):
        check_equal(tmp_path, tensors)
    assert "is a pickle: reading it with weights_only=True" in caplog.text
    assert ("older than torch 1.6" in caplog.text) is not zipped


def test_sharded_pickle(tmp_path, tensors):
    weight_map = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        torch.save({name: tensors[name] for name in tensors if weight_map[name] == file}, tmp_path / file)
    write_index(tmp_path, weight_map, "pytorch_model.bin.index.json")
    check_equal(tmp_path, tensors)


def test_a_malicious_pickle_does_not_run(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    torch.save({"w": Attack()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(SourceError, match="cannot be loaded as weights only(.|\n)*do not trust this file"):
        open_reader(tmp_path)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("content", [[torch.ones(1)], {"w": torch.ones(1), "step": 3}])
def test_a_pickle_of_something_else(tmp_path, content):
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(SourceError, match=r"is not a state dict\n  found:    (list|int)"):
        open_reader(tmp_path)


def test_a_truncated_pickle(tmp_path, tensors):
    file = tmp_path / "pytorch_model.bin"
    torch.save(tensors, file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(SourceError, match=r"pytorch_model.bin cannot be loaded"):
        open_reader(tmp_path)


def test_nothing_there(tmp_path):
    with pytest.raises(SourceError, match="nowhere is not a checkpoint\n  found:    nothing there"):
        open_reader(tmp_path / "nowhere")
    with pytest.raises(SourceError, match="holds no weights\n  found:    an empty directory"):
        open_reader(tmp_path)
    (tmp_path / "some.gguf").touch()
    with pytest.raises(SourceError, match=r"remedy:   name the GGUF file itself, such as .*some.gguf"):
        open_reader(tmp_path)
    with pytest.raises(SourceError, match="found:    a file"):
        open_reader(Path(__file__))


@pytest.mark.parametrize("kept", [0, 5, 60, -1])
def test_a_truncated_file_names_both_sizes(single, kept):
    file = single / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:kept])
    size = len(whole[:kept])
    with pytest.raises(SourceError, match=rf"model.safetensors is not a valid(.|\n)*found:    {size} bytes") as caught:
        open_reader(single)
    if kept == -1:
        assert f"expected: {len(whole)} bytes" in str(caught.value)


def test_a_file_that_is_too_long(single):
    with (single / "model.safetensors").open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(SourceError, match="as its header describes"):
        open_reader(single)


def entry(**changes):
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"\xff", "not JSON"),
        (b"[1]", "a JSON list"),
        ({"w": 3}, "malformed header entry for w"),
        ({"w": entry(shape=[-2])}, "malformed header entry for w"),
        ({"w": entry(shape=["2"])}, "malformed header entry for w"),
        ({"w": entry(dtype="F33")}, "unsupported element type\n  found:    F33"),
        ({"w": entry(shape=[3])}, r"8 bytes for w\n  expected: 12 bytes"),
        ({"w": entry(data_offsets=[8, 0])}, "-8 bytes for w"),
        ({"w": entry(data_offsets=[4, 12])}, "w begins at byte 4\n  expected: byte 0, where the data ends"),
        ({"w": entry(), "v": entry()}, "begins at byte 0\n  expected: byte 8, where . ends"),
        ({"w": entry(), "v": entry(data_offsets=[12, 20])}, "v begins at byte 12\n  expected: byte 8"),
    ],
)
def test_a_bad_header(tmp_path, header, message):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(SourceError, match=message):
        open_reader(tmp_path)


def test_an_absurd_header_length(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    with pytest.raises(SourceError, match=f"a header length of {1 << 60} bytes"):
        open_reader(tmp_path)


def test_missing_shards_are_all_named(tmp_path, tensors):
    files = set(write_sharded(tmp_path, tensors).values())
    for file in files:
        (tmp_path / file).unlink()
    with pytest.raises(SourceError, match=f"2 of the 2 files .*\n.*{'.*'.join(sorted(files))}"):
        open_reader(tmp_path)


@pytest.mark.parametrize("kind", ["parent", "absolute"])
def test_an_index_must_not_leave_its_directory(tmp_path, tensors, kind):
    outside = tmp_path / "outside.safetensors"
    save_file(tensors, outside)
    model = tmp_path / "model"
    model.mkdir()
    name = {"parent": "../outside.safetensors", "absolute": str(outside)}[kind]
    write_index(model, dict.fromkeys(tensors, name))
    with pytest.raises(SourceError, match="lies outside the checkpoint"):
        open_reader(model)


@pytest.mark.parametrize("store", ["models--x/blobs", "shared storage"])
def test_links_that_the_owner_made_are_followed(tmp_path, tensors, store):
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / store
    blobs.mkdir(parents=True)
    for file in set(write_sharded(snapshot, tensors).values()):
        (snapshot / file).rename(blobs / file)
        (snapshot / file).symlink_to(blobs / file)
    check_equal(snapshot, tensors)


def test_listed_but_not_stored(tmp_path, tensors):
    weight_map = write_sharded(tmp_path, tensors)
    file = next(iter(weight_map.values()))
    write_index(tmp_path, weight_map | {"ghost": file})
    with pytest.raises(SourceError, match=rf"not stored: ghost \({file}\)"):
        open_reader(tmp_path)


def test_stored_but_not_listed(tmp_path, tensors):
    weight_map = write_sharded(tmp_path, tensors)
    lost, *_ = weight_map
    del weight_map[lost]
    write_index(tmp_path, weight_map)
    check_equal(tmp_path, tensors)
    assert open_reader(tmp_path).unlisted == {lost}


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("equal", [True, False])
def test_a_second_copy_of_a_listed_tensor(tmp_path, tensors, kind, equal):
    """The index says which copy is read; transformers loads the last one, so another one is refused."""
    name, *_ = tensors
    copy = {name: tensors[name] if equal else tensors[name] + 1, "more": torch.ones(1)}
    save = {"safetensors": save_file, "bin": torch.save}[kind]
    stem, index = {"safetensors": ("model", INDEX), "bin": ("pytorch_model", "pytorch_model.bin.index.json")}[kind]
    files = [f"{stem}-0000{number}-of-00002.{kind}" for number in (1, 2)]
    save(tensors, tmp_path / files[0])
    save(copy, tmp_path / files[1])
    write_index(tmp_path, dict.fromkeys(tensors, files[0]) | {"more": files[1]}, name=index)
    if equal:
        assert open_reader(tmp_path).tensors[name].file == tmp_path / files[0]
        check_equal(tmp_path, {**tensors, "more": copy["more"]})
    else:
        with pytest.raises(SourceError, match=rf"different tensors {name}\n.*{files[0]}.*{files[1]}"):
            open_reader(tmp_path)


@pytest.mark.parametrize(
    ("there", "read"),
    [
        (("model.safetensors", INDEX), "model.safetensors"),
        (("model.safetensors", "pytorch_model.bin"), "model.safetensors"),
        ((INDEX, "pytorch_model.bin"), INDEX),
        (("pytorch_model.bin", "pytorch_model.bin.index.json"), "pytorch_model.bin"),
        (("pytorch_model.bin", "adapter_model.safetensors"), "pytorch_model.bin"),
        (("pytorch_model.bin", "model-00001-of-00002.safetensors"), "pytorch_model.bin"),
        (("other.safetensors", "model.safetensors"), "other.safetensors"),
    ],
)
def test_what_is_read_is_what_transformers_reads(tmp_path, there, read):
    """Every file holds another model; transformers' own loading says which is right. The last case is config.json's."""
    config = AutoConfig.for_model("llama", **TINY)
    models = {}
    for seed, name in enumerate(there):
        torch.manual_seed(seed)
        models[name] = LlamaForCausalLM(config)
        state = {key: value.clone() for key, value in models[name].state_dict().items()}
        if name.endswith("index.json"):
            shard = name.replace(".safetensors.index.json", "-of.safetensors").replace(".bin.index.json", "-of.bin")
            (save_file if "safetensors" in shard else torch.save)(state, tmp_path / shard)
            write_index(tmp_path, dict.fromkeys(state, shard), name=name)
        else:
            (save_file if name.endswith(".safetensors") else torch.save)(state, tmp_path / name)
    config.save_pretrained(tmp_path)
    if read.startswith("other"):
        content = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(content | {"transformers_weights": read}))
    reader = open_reader(tmp_path)
    for name, value in LlamaForCausalLM.from_pretrained(tmp_path).state_dict().items():
        assert torch.equal(reader.read(name), value)
        assert torch.equal(value, models[read].state_dict()[name])


@pytest.mark.parametrize("name", ["../model.safetensors", "nothing.safetensors", "model.gguf", 3])
def test_config_names_no_weights(single, name):
    (single / "config.json").write_text(json.dumps({"transformers_weights": name}))
    with pytest.raises(SourceError, match="transformers_weights|lies outside"):
        open_reader(single)


def test_two_sets_of_weights_are_said(single, tensors, caplog):
    write_index(single, dict.fromkeys(tensors, "model.safetensors"))
    assert has_weights(single)
    open_reader(single)
    assert caplog.text.count(f"reading model.safetensors, as transformers does, and not {INDEX}") == 1


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_pointer_of_git_lfs(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    with pytest.raises(SourceError, match=r"was not downloaded\n(.*\n)*.*git lfs pull"):
        open_reader(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": {}}', '{"weight_map": {"w": 1}}'])
def test_a_bad_index(tmp_path, text):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(SourceError, match=INDEX):
        open_reader(tmp_path)


def test_unaligned_source_tensors_are_read(tmp_path):
    header = {"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, "b": entry(data_offsets=[1, 9])}
    text = json.dumps(header).encode()
    data = struct.pack("<Q", len(text)) + text + b"\x05" + struct.pack("<2f", 1, 2)
    (tmp_path / "model.safetensors").write_bytes(data)
    check_equal(tmp_path, load_file(tmp_path / "model.safetensors"))
