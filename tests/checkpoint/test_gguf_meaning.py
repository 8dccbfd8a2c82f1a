"""GGUF: what a file says of the computation is computed, or refused by its name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import conversions
import gguf_models
import pytest
import torch
from gguf_files import vocabulary
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from upcycle.checkpoint import gguf_config, open_reader
from upcycle.errors import SourceError
from upcycle.models.load import load_dense
from upcycle.models.source import open_source
from upcycle.models.text import DEFAULT_TEXT
from upcycle.options.config import VerifyConfig
from upcycle.verify.run import verify

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

TOKENS = 100
META = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, **META, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 32}
YARN_KEYS = {"type": "yarn", "factor": 4.0, "original_context_length": 32}
BETAS = {"beta_fast": 8.0, "beta_slow": 2.0}
LONG = {"long_factor": [1.0, 2.0, 3.0, 4.0], "short_factor": [1.0, 1.25, 1.5, 2.0]}
LONGROPE = {"rope_type": "longrope", "rope_theta": 10_000.0, "original_max_position_embeddings": 64, **LONG}
LONG_TENSORS = {
    "rope_factors_long.weight": torch.tensor(LONG["long_factor"]),
    "rope_factors_short.weight": torch.tensor(LONG["short_factor"]),
}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
}


def scaling(**keys: Any) -> dict[str, Any]:
    return {f"rope.scaling.{key}": value for key, value in keys.items()}


def logits(model: nn.Module) -> Tensor:
    ids = torch.randint(4, len(vocabulary()), (1, TOKENS), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return model(input_ids=ids).logits


def error(model: nn.Module, other: nn.Module) -> float:
    expected = logits(model)
    return float((logits(other) - expected).norm() / expected.norm())


# name of the model, its changes, GGUF architecture, and what the converter writes for the changes
SCALED = {
    "llama3": ("llama", {"rope_parameters": LLAMA3}, "llama", {}),
    "linear": ("llama", {"rope_parameters": LINEAR}, "llama", scaling(type="linear", factor=4.0)),
    "linear, in old words": ("llama", {"rope_parameters": LINEAR}, "llama", {"rope.scale_linear": 4.0}),
    "yarn": ("llama", {"rope_parameters": YARN}, "llama", scaling(**YARN_KEYS)),
    "yarn with its own ramp": (
        "llama",
        {"rope_parameters": YARN | BETAS},
        "llama",
        scaling(**YARN_KEYS, yarn_beta_fast=8.0, yarn_beta_slow=2.0, yarn_ext_factor=1.0),
    ),
    "yarn with its own attention": (
        "llama",
        {"rope_parameters": {**YARN, "attention_factor": 2.277258872223978}},  # 2 (0.1 ln 4 + 1)
        "llama",
        scaling(**YARN_KEYS, attn_factor=2.0),
    ),
    "longrope": (
        "phi3",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64},
        "phi3",
        scaling(original_context_length=64, attn_factor=(1 + 1 / 6) ** 0.5),
    ),
    "yarn of qwen": ("qwen2", {"rope_parameters": YARN}, "qwen2", scaling(**YARN_KEYS)),
    "linear of half a head": (
        "nemotron",
        {"rope_parameters": {**LINEAR, "partial_rotary_factor": 0.5}},
        "nemotron",
        scaling(type="linear", factor=4.0),
    ),
    "full layers only": (
        "gemma3",
        {"rope_parameters": GEMMA3_ROPE, "sliding_window_pattern": 2, "query_pre_attn_scalar": 8},
        "gemma3",
        {
            **scaling(type="linear", factor=8.0),
            "rope.freq_base_swa": 5000.0,
            "attention.sliding_window": 4,
            "attention.sliding_window_pattern": 2,
        },
    ),
}


def written(path: Path, case: tuple[str, dict[str, Any], str, dict[str, Any]]) -> tuple[nn.Module, Path]:
    name, changes, arch, keys = case
    model = gguf_models.build(name, **changes)
    rope_type = (getattr(model.config, "rope_parameters", None) or {}).get("rope_type")
    tensors = {"longrope": LONG_TENSORS}.get(rope_type, {})
    if rope_type == "llama3":
        tensors = {"rope_freqs.weight": gguf_models.llama3_factors(model.config)}
    return model, gguf_models.convert(path / "tiny.gguf", model, arch, keys=keys, tensors=tensors)


@pytest.mark.parametrize("case", SCALED)
def test_scaled_positions(case, tmp_path):
    """And a model that is read without its scaling, as transformers does, is another one."""
    model, path = written(tmp_path, SCALED[case])
    read = load_dense(open_source(str(path)))
    assert error(model, read) < 1e-5
    unscaled = AutoModelForCausalLM.from_config(
        type(read.config).from_dict(
            read.config.to_dict()
            | {
                "rope_parameters": None,
                "rope_theta": 10_000.0,
                "partial_rotary_factor": 0.5 if case.endswith("head") else 1.0,
            }
        )
    ).eval()
    unscaled.load_state_dict(read.state_dict())
    assert error(model, unscaled) > 1e-2


@pytest.mark.parametrize("case", ["llama3", "yarn of qwen"])
def test_the_output_has_the_scaling_and_verify_too(case, tmp_path):
    model, path = written(tmp_path, SCALED[case])
    moe = conversions.run(conversions.options(path, tmp_path / "moe")).directory
    assert error(model, AutoModelForCausalLM.from_pretrained(moe, dtype=torch.float32)) < 6e-3
    config = VerifyConfig(
        source=str(path), moe=str(moe), text=None, tokens=96, sequence_length=96, tolerance=1e-3, format="table"
    )
    report = verify(config)
    assert report["passed"]
    ids = AutoTokenizer.from_pretrained(moe)(DEFAULT_TEXT.read_text(), return_tensors="pt")["input_ids"][:, :96]
    with torch.inference_mode():
        assert report["dense_loss"] == pytest.approx(float(model(input_ids=ids, labels=ids).loss), rel=1e-5)


# What is not a default of the model type, or is one that the file does not say, and the keys that say it.
PLAIN = {
    "llama": ("llama", {}, "llama", {}),
    "wide heads": ("llama", {"head_dim": 16}, "llama", {}),
    "biases": ("llama_biases", {}, "llama", {}),
    "scaling of none": ("llama", {}, "llama", scaling(type="none", factor=4.0)),
    "tied": ("llama", {"tie_word_embeddings": True}, "llama", {"rope.freq_base": None}),
    "qwen2": ("qwen2", {}, "qwen2", {"pooling_type": 3}),
    "qwen3": ("qwen3", {}, "qwen3", {}),
    "phi3": ("phi3", {}, "phi3", {"attention.sliding_window": 0, **scaling(original_context_length=128)}),
    "phi3 windows": ("phi3_windows", {}, "phi3", {"attention.sliding_window": 4}),
    "phi3 partial": ("phi3_partial_rotary", {}, "phi3", {}),
    "nemotron": ("nemotron", {}, "nemotron", scaling(type="none")),
    "gpt2": ("gpt2", {}, "gpt2", {}),
    "gpt2 untied": ("gpt2_untied", {"activation_function": "gelu_new"}, "gpt2", {}),
    "gemma2": (
        "gemma2",
        {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
        "gemma2",
        {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 2.0, "attention.sliding_window": 4},
    ),
    "gemma2 scale": (
        "gemma2",
        {"query_pre_attn_scalar": 100},
        "gemma2",
        {"attention.scale": 0.1, "attention.sliding_window": 4},
    ),
    "gemma3 without windows": (
        "gemma3",
        {"layer_types": ["full_attention"] * 2, "query_pre_attn_scalar": 8, "final_logit_softcapping": 2.0},
        "gemma3",
        {"final_logit_softcapping": 2.0, "mm.tokens_per_image": 256},
    ),
    "gemma3 by layer": (
        "gemma3",
        {"layer_types": ["full_attention", "sliding_attention"], "query_pre_attn_scalar": 8},
        "gemma3",
        {"attention.sliding_window": 4, "attention.sliding_window_pattern": [False, True]},
    ),
}


@pytest.mark.parametrize("case", PLAIN)
def test_what_the_converter_writes_is_computed(case, tmp_path):
    model, path = written(tmp_path, PLAIN[case])
    assert error(model, load_dense(open_source(str(path)))) < 1e-5


@pytest.mark.parametrize(("layers", "scalar"), [(2, 8), (46, 16)])
def test_the_scale_of_scores_that_no_key_says(layers, scalar, tmp_path):
    """Llama.cpp's rule of it: head size, or hidden size by heads for the 27B model, which it knows by its layers."""
    model = gguf_models.build("gemma2", num_hidden_layers=layers, num_attention_heads=2)
    path = gguf_models.convert(tmp_path / "tiny.gguf", model, "gemma2")
    assert gguf_config(path)["query_pre_attn_scalar"] == scalar


@pytest.mark.parametrize(
    ("theta", "head", "parameters"),
    [
        (500_000.0, 128, {"factor": 8.0, **META}),
        (500_000.0, 64, {"factor": 32.0, **META}),
        (500_000.0, 128, {"factor": 16.0, **META, "original_max_position_embeddings": 4096}),
        (10_000.0, 128, {"factor": 5.0, **META, "high_freq_factor": 3.0, "original_max_position_embeddings": 300}),
    ],
)
def test_the_parameters_of_llama3_are_found(theta, head, parameters, tmp_path):
    rope = {"rope_type": "llama3", "rope_theta": theta, **parameters}
    model = gguf_models.build("llama", head_dim=head, rope_parameters=rope)
    tensors = {"rope_freqs.weight": gguf_models.llama3_factors(model.config)}
    assert (
        gguf_config(gguf_models.convert(tmp_path / "tiny.gguf", model, "llama", tensors=tensors))["rope_parameters"]
        == rope
    )


def test_odd_parameters_of_llama3_are_computed(tmp_path):
    bounds = {"low_freq_factor": 1.3, "high_freq_factor": 3.1, "original_max_position_embeddings": 100}
    rope = {"rope_type": "llama3", "rope_theta": 10_000.0, "factor": 5.0, **bounds}
    model, path = written(tmp_path, ("llama", {"head_dim": 64, "rope_parameters": rope}, "llama", {}))
    assert error(model, load_dense(open_source(str(path)))) < 1e-5


@pytest.mark.parametrize(("factor", "rope"), [(1.0, {"rope_type": "default"}), (4.0, {"rope_type": "linear"})])
def test_one_factor_for_all_frequencies(factor, rope, tmp_path):
    tensors = {"rope_freqs.weight": torch.full((4,), factor)}
    path = gguf_models.convert(tmp_path / "tiny.gguf", gguf_models.build("llama"), "llama", tensors=tensors)
    found = AutoConfig.for_model(**gguf_config(path)).rope_parameters
    assert found == {"rope_theta": 10_000.0, **rope, **({"factor": 4.0} if factor != 1 else {})}


REFUSED = [
    ("llama", {"attention.clamp_kqv": 8.0}, "attention.clamp_kqv = 8.0"),
    ("llama", {"logit_scale": 0.5}, "logit_scale = 0.5"),
    ("llama", {"residual_scale": 0.25}, "residual_scale = 0.25"),
    ("llama", {"embedding_scale": 12.0}, "embedding_scale = 12.0"),
    ("llama", {"attention.scale": 0.1}, "attention.scale = 0.1"),
    ("gemma2", {"attention.scale": 0.11}, "query_pre_attn_scalar.* 82.6"),
    ("llama", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
    ("llama", {"attention.sliding_window": 4}, "attention.sliding_window = 4"),
    ("qwen2", {"attention.sliding_window": 4}, "attention.sliding_window = 4"),
    ("llama", {"attention.sliding_window_pattern": 2}, "attention.sliding_window_pattern = 2"),
    ("llama", {"attention.layer_norm_epsilon": 0.1}, "attention.layer_norm_epsilon = 0.1"),
    ("llama", {"attention.value_length": 4}, "attention.value_length = 4"),
    ("llama", {"attention.causal": False}, "attention.causal = False"),
    ("llama", {"attention.head_count_kv": [2, 1]}, r"attention.head_count_kv = \[2, 1\]"),
    ("llama", {"expert_count": 8}, "expert_count = 8"),
    ("llama", {"rope.dimension_count": 4}, "rope.dimension_count = 4"),
    ("llama", {"rope.dimension_sections": [2, 1, 1, 0]}, r"rope.dimension_sections = \[2, 1, 1, 0\]"),
    ("llama", {"rope.freq_base_swa": 5.0}, "rope.freq_base_swa = 5.0"),
    ("llama", {"brand_new": 1}, "brand_new = 1"),
    ("llama", scaling(type="dynamic", factor=2.0), "rope.scaling.type = dynamic"),
    ("llama", scaling(type="longrope"), "rope.scaling.type = longrope without rope_factors_long.weight"),
    ("llama", scaling(type="linear", factor=2.0, attn_factor=1.5), "rope.scaling.attn_factor = 1.5"),
    ("llama", scaling(**YARN_KEYS, yarn_ext_factor=0.5), "rope.scaling.yarn_ext_factor = 0.5"),
    ("llama", scaling(**YARN_KEYS, yarn_attn_factor=1.0), "rope.scaling.yarn_attn_factor = 1.0"),
    ("llama", scaling(**YARN_KEYS, yarn_log_multiplier=0.5), "rope.scaling.yarn_log_multiplier = 0.5"),
    ("phi3", scaling(type="linear", factor=2.0), "one of .'longrope'., got linear"),
    ("gpt2", {"rope.freq_base": 5.0}, "rope.freq_base"),
]


@pytest.mark.parametrize(
    ("name", "keys", "found"), REFUSED, ids=lambda value: None if isinstance(value, dict) else value
)
def test_a_key_that_is_not_computed(name, keys, found, tmp_path):
    path = gguf_models.convert(tmp_path / "tiny.gguf", gguf_models.build(name), name, keys=keys)
    with pytest.raises(SourceError, match=rf"found:    .*{found}(.|\n)*remedy:   use the model's safetensors files"):
        open_source(str(path))


@pytest.mark.parametrize(
    "name",
    [
        "blk.0.attn_q_norm.weight",
        "blk.1.post_attention_norm.weight",
        "blk.0.ffn_norm.bias",
        "output.bias",
        "blk.0.attn_sinks.weight",
        "blk.0.attn_q.scale",
        "v.blk.0.attn_q.weight",
    ],
)
def test_a_tensor_that_the_model_has_no_place_for(name, tmp_path):
    tensors = {name: torch.ones(8)}
    path = gguf_models.convert(tmp_path / "tiny.gguf", gguf_models.build("llama"), "llama", tensors=tensors)
    with pytest.raises(SourceError, match=rf"found:    {name}\n  expected: tensors that a llama model has a place for"):
        open_reader(path)


@pytest.mark.parametrize(
    ("tensors", "found"),
    [
        ({"rope_freqs.weight": torch.tensor([1.0, 3.0, 2.0, 8.0])}, "rope_freqs.weight = 1, 3, 2, 8"),
        ({"rope_freqs.weight": torch.ones(3)}, r"rope_freqs.weight with \(3,\) values"),
        ({"rope_factors_long.weight": torch.ones(4)}, "rope factors without rope_factors_short.weight"),
        (LONG_TENSORS | {"rope_freqs.weight": torch.ones(4)}, "rope_freqs.weight with rope_factors_long.weight"),
    ],
)
def test_rope_tensors_that_no_parameters_give(tensors, found, tmp_path):
    path = gguf_models.convert(tmp_path / "tiny.gguf", gguf_models.build("llama"), "llama", tensors=tensors)
    with pytest.raises(SourceError, match=f"found:    {found}"):
        open_source(str(path))


def test_a_part_of_a_model(tmp_path):
    metadata = {"split.count": 3, "split.no": 0}
    path = gguf_models.convert(tmp_path / "tiny.gguf", gguf_models.build("llama"), "llama", metadata=metadata)
    with pytest.raises(SourceError, match=r"one part of a model\n  found:    split.count = 3(.|\n)*--merge"):
        open_source(str(path))


def test_two_scalings(tmp_path):
    tensors = {"rope_freqs.weight": torch.full((4,), 2.0)}
    keys = scaling(type="linear", factor=4.0)
    path = gguf_models.convert(tmp_path / "tiny.gguf", gguf_models.build("llama"), "llama", keys=keys, tensors=tensors)
    with pytest.raises(SourceError, match="found:    rope.scaling.factor = 4.0 with rope_freqs.weight"):
        open_source(str(path))


@pytest.mark.parametrize("key", ["block_count", "attention.head_count", "attention.layer_norm_rms_epsilon"])
def test_a_key_that_every_file_has(key, tmp_path):
    path = gguf_models.convert(tmp_path / "tiny.gguf", gguf_models.build("llama"), "llama", keys={key: None})
    with pytest.raises(SourceError, match=f"does not say what its model needs\n  found:    no {key}"):
        open_source(str(path))
