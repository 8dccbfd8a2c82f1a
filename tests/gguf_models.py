"""Tiny Hugging Face models as the GGUF files that llama.cpp's converter makes of them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import gguf
import models
import torch
from gguf_files import add_tokenizer, vocabulary

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

POSITIONS = 128
_MINUS_ONE = ("gemma2", "gemma3", "nemotron")  # norms that Hugging Face stores minus one
_PERMUTED = ("llama",)  # queries and keys with each rotated pair side by side
_LAYERNORM = ("gpt2", "nemotron")


def build(name: str, **changes: Any) -> nn.Module:
    """A model of `tests/models.py` with the tokenizer of `gguf_files` and more positions than a test's tokens."""
    if models.MODELS[name]["model_type"] == "gpt2":
        changes = {"n_positions": POSITIONS, **changes}
    return models.build(name, **{"vocab_size": len(vocabulary()), "max_position_embeddings": POSITIONS, **changes})


def keys_of(config: Any, arch: str) -> dict[str, Any]:
    """The keys that the converter writes for every model of an architecture; scaling and softcapping come on top."""
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    keys: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": getattr(config, "intermediate_size", None) or config.n_inner,
        "attention.head_count": heads,
        "vocab_size": config.vocab_size,
    }
    if arch in _LAYERNORM:
        eps = getattr(config, "layer_norm_epsilon", None) or config.norm_eps
        keys["attention.layer_norm_epsilon"] = eps
    if arch != "gpt2":
        rope = config.rope_parameters
        rope = rope.get("full_attention", rope)
        keys |= {"attention.head_count_kv": config.num_key_value_heads, "rope.freq_base": float(rope["rope_theta"])}
        keys["rope.dimension_count"] = int(head * rope.get("partial_rotary_factor", 1.0))
        keys["attention.layer_norm_rms_epsilon"] = getattr(config, "rms_norm_eps", None) or config.norm_eps
    if getattr(config, "head_dim", None):
        keys |= {"attention.key_length": head, "attention.value_length": head}
    return keys


def convert(path: Path, model: nn.Module, arch: str, **said: Any) -> Path:
    """Write a model in float32.

    Args:
        path: where.
        model: a Hugging Face model.
        arch: GGUF's name of the architecture.
        said: `keys`, more of the architecture's keys (None leaves one out); `metadata`, other keys; `tensors`, more
            tensors.
    """
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name("tiny")
    keys = {**keys_of(model.config, arch), **said.get("keys", {})}
    for key, value in {**{f"{arch}.{key}": value for key, value in keys.items()}, **said.get("metadata", {})}.items():
        if value is not None:
            _add(writer, key, value)
    add_tokenizer(writer)
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(number, model.config.num_hidden_layers)
    stored = {
        names.get_name(name, (".weight", ".bias")): _value(arch, name, tensor, model.config)
        for name, tensor in model.state_dict().items()
        if not (name == "lm_head.weight" and model.config.tie_word_embeddings)
    }
    for name, tensor in {**stored, **said.get("tensors", {})}.items():
        writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    add.get(type(value), writer.add_array)(key, value)


def _value(arch: str, name: str, tensor: Tensor, config: Any) -> Tensor:
    if arch in _MINUS_ONE and name.endswith("norm.weight"):
        return tensor + 1
    if arch == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        return tensor.T
    if arch in _PERMUTED and ".q_proj." in name:
        return _side_by_side(tensor, config.num_attention_heads)
    if arch in _PERMUTED and ".k_proj." in name:
        return _side_by_side(tensor, config.num_key_value_heads)
    return tensor


def _side_by_side(tensor: Tensor, heads: int) -> Tensor:
    halves = tensor.unflatten(0, (heads, 2, -1))
    return halves.transpose(1, 2).reshape(tensor.shape)


def llama3_factors(config: Any) -> Tensor:
    """The converter's `rope_freqs.weight` for a llama3 configuration: what divides each inverse frequency."""
    rope = config.rope_parameters
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    waves = 2 * math.pi * rope["rope_theta"] ** (torch.arange(0, config.head_dim, 2) / config.head_dim)
    smooth = ((rope["original_max_position_embeddings"] / waves - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - smooth) / rope["factor"] + smooth)
