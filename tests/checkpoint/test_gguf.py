"""GGUF: every tensor must equal, bit for bit, the one that transformers loads from the same file."""

from __future__ import annotations

import json

import pytest
import torch
import training
from gguf import GGMLQuantizationType as Kind
from gguf_files import HEADS, HIDDEN, KV_HEADS, LAYERS, TEMPLATE, write_gguf
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from upcycle.checkpoint import gguf_config, open_reader, write_gguf_tokenizer
from upcycle.distributed.ranks import Ranks
from upcycle.errors import ConfigError, SourceError
from upcycle.parallel.rank_layout import RankLayout
from upcycle.train.models import start_model

pytest_plugins = ("text_model",)


def loaded(path):
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)


@pytest.mark.parametrize("dropped", [(), ("output.weight",)], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "matrices", [[Kind.Q4_1, Kind.Q8_0], [Kind.F16], [Kind.BF16, Kind.F32]], ids=["blocks", "f16", "mixed"]
)
def test_equals_transformers(tmp_path, matrices, dropped):
    path = write_gguf(tmp_path / "tiny.gguf", matrices, dropped=dropped)
    reader, model = open_reader(path), loaded(path)
    state = model.state_dict()
    assert state.keys() - reader.tensors.keys() == ({"lm_head.weight"} if dropped else set())
    assert reader.files == (path,)
    for name, info in reader.tensors.items():
        read = reader.read(name)
        assert torch.equal(read.float(), state[name])
        assert tuple(read.shape) == info.shape
        assert read.nbytes == info.nbytes
        assert read.is_contiguous()
    expected = {kind.name if kind in (Kind.F16, Kind.BF16) else "F32" for kind in matrices} | {"F32"}
    assert {info.dtype for info in reader.tensors.values()} == expected


@pytest.mark.parametrize("vectors", [Kind.F32, Kind.F16])
@pytest.mark.parametrize(
    ("arch", "per_layer"),
    [
        ("qwen2", {"attn_q.bias": (HIDDEN,), "attn_k.bias": (32,), "attn_v.bias": (32,)}),
        ("gemma2", {"post_attention_norm.weight": (HIDDEN,), "post_ffw_norm.weight": (HIDDEN,)}),
    ],
)
def test_other_families(tmp_path, arch, per_layer, vectors):
    extra = {f"blk.{layer}.{name}": shape for layer in range(LAYERS) for name, shape in per_layer.items()}
    options = {"arch": arch, "dropped": ("output.weight",), "extra": extra, "vectors": vectors}
    path = write_gguf(tmp_path / "tiny.gguf", [Kind.Q8_0], **options)
    reader, state = open_reader(path), loaded(path).state_dict()
    assert state.keys() - reader.tensors.keys() == {"lm_head.weight"}
    assert all(torch.equal(reader.read(name), state[name]) for name in reader.tensors)


def test_a_shape_that_the_metadata_does_not_imply(tmp_path):
    with pytest.raises(SourceError, match=r"up_proj.weight in another shape(.|\n)*\(96, 64\)\n  expected: \(128, 64\)"):
        open_reader(write_gguf(tmp_path / "tiny.gguf", [Kind.F32], ffn=128))


def test_q_and_k_are_unpermuted_where_the_file_leaves_the_kv_heads_out(tmp_path):
    """Transformers keeps q and k permuted in such a file; ours must equal the file that states the number."""
    (tmp_path / "said").mkdir()
    left_out = open_reader(write_gguf(tmp_path / "tiny.gguf", [Kind.F32], kv_heads=None))
    said = open_reader(write_gguf(tmp_path / "said" / "tiny.gguf", [Kind.F32], kv_heads=HEADS))
    assert all(torch.equal(left_out.read(name), said.read(name)) for name in said.tensors)


def test_config(tmp_path):
    for dropped in ((), ("output.weight",)):
        config = gguf_config(write_gguf(tmp_path / "tiny.gguf", [Kind.F32], dropped=dropped))
        assert config["tie_word_embeddings"] is bool(dropped)
        assert config["model_type"] == "llama"
        assert config["architectures"] == ["LlamaForCausalLM"]
        assert (config["hidden_size"], config["num_key_value_heads"]) == (HIDDEN, KV_HEADS)
        assert not {"quantization_config", "_name_or_path", "_model_name_or_path"} & config.keys()
        (tmp_path / "config.json").write_text(json.dumps(config))
        ours, theirs = (AutoConfig.from_pretrained(tmp_path, **kw) for kw in ({}, {"gguf_file": "tiny.gguf"}))
        odd = {"architectures", "_name_or_path", "_model_name_or_path"}
        assert {k: v for k, v in ours.to_dict().items() if k not in odd} == {
            k: v for k, v in theirs.to_dict().items() if k not in odd
        }


def test_tokenizer(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", [Kind.F32])
    directory = tmp_path / "tokenizer"
    directory.mkdir()
    written = write_gguf_tokenizer(path, directory)
    assert set(written) == {file.name for file in directory.iterdir()} >= {"tokenizer.json", "chat_template.jinja"}
    ours = AutoTokenizer.from_pretrained(directory)
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    assert ours("he said<|end|>").input_ids == theirs("he said<|end|>").input_ids
    assert ours.chat_template == TEMPLATE


def test_a_missing_tensor(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", [Kind.F32], dropped=("blk.1.ffn_up.weight",))
    with pytest.raises(
        SourceError, match="lacks tensors of its model\n  found:    no model.layers.1.mlp.up_proj.weight"
    ):
        open_reader(path)


@pytest.mark.parametrize("kept", [0, 3, 40, 700, 0.5, -40])
def test_a_truncated_file(tmp_path, kept):
    path = write_gguf(tmp_path / "tiny.gguf", [Kind.F32])
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept) if isinstance(kept, float) else kept])
    with pytest.raises(SourceError, match=f"is not a readable GGUF file\n  found:    {path.stat().st_size} bytes"):
        open_reader(path)


def test_a_file_that_is_something_else(tmp_path):
    path = tmp_path / "tiny.gguf"
    path.write_bytes(b"PK\3\4" * 100)
    for use in (open_reader, gguf_config, lambda path: write_gguf_tokenizer(path, tmp_path)):
        with pytest.raises(SourceError, match="is not a readable GGUF file"):
            use(path)


def test_an_unknown_architecture(tmp_path):
    with pytest.raises(SourceError, match="found:    rwkv6\n  expected: .*llama"):
        open_reader(write_gguf(tmp_path / "tiny.gguf", [Kind.F32], arch="rwkv6"))


def test_ranks_that_read_slices_refuse_it(text, tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", [Kind.F32])
    config = training.options(text, tmp_path / "run", "model=dense", f"source='{path}'")
    with pytest.raises(ConfigError, match=r"only of safetensors files(.|\n)*tiny\.gguf"):
        start_model(config, Ranks(layout=RankLayout(fsdp=2)))
