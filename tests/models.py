"""Tiny real Hugging Face models, built on the spot: one line for every family, and for every option that matters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.trainers import BpeTrainer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

if TYPE_CHECKING:
    from pathlib import Path

VOCAB, HIDDEN, WIDTH, LAYERS, POSITIONS = 64, 32, 24, 2, 64
LENGTH, WINDOW = 12, 4  # tokens of a test sequence, and the sliding window, which is shorter

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
_GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": HIDDEN,
    "n_inner": WIDTH,
    "n_layer": LAYERS,
    "n_head": 4,
    "n_positions": POSITIONS,
}
_GPT2 |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
_GEMMA = {"head_dim": 8}
_HYBRID = {"hybrid_override_pattern": "M-*-", "num_hidden_layers": 4, "head_dim": 8, "n_groups": 2, "ssm_state_size": 8}
_HYBRID |= {"mamba_num_heads": 4, "mamba_head_dim": 8, "chunk_size": 8}
_SLIDING = {"use_sliding_window": True, "sliding_window": WINDOW}
_BIASES = {"attention_bias": True, "mlp_bias": True}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 2.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 16}
_LONGROPE = {"rope_type": "longrope", "rope_theta": 1000.0, "short_factor": [1.0, 1.1, 1.2, 1.3]}
_LONGROPE |= {"long_factor": [1.0, 2.0, 3.0, 4.0]}
_HALF_ROTARY = {"rope_type": "default", "partial_rotary_factor": 0.5}

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama_tied": {"model_type": "llama", "tie_word_embeddings": True, "rope_parameters": LLAMA3},
    "llama_biases": {"model_type": "llama", **_BIASES},
    "llama_attention_bias": {"model_type": "llama", "attention_bias": True},
    "mistral": {"model_type": "mistral", "sliding_window": WINDOW, "head_dim": 16},
    "mistral_full": {"model_type": "mistral", "sliding_window": None, "rope_parameters": YARN},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2_windows": {"model_type": "qwen2", **_SLIDING, "max_window_layers": 1},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "qwen3_windows": {"model_type": "qwen3", "head_dim": 8, "attention_bias": True, **_SLIDING, "max_window_layers": 0},
    "qwen3_one_head": {"model_type": "qwen3", "head_dim": HIDDEN, "num_attention_heads": 1, "num_key_value_heads": 1},
    "olmo": {"model_type": "olmo", "clip_qkv": 0.5, "attention_bias": True},
    "olmo2": {"model_type": "olmo2"},
    "olmo2_bias": {"model_type": "olmo2", "attention_bias": True, "tie_word_embeddings": True},
    "gemma": {"model_type": "gemma", **_GEMMA},
    "gemma2": {"model_type": "gemma2", **_GEMMA, "sliding_window": WINDOW},
    "gemma3": {"model_type": "gemma3_text", **_GEMMA, "sliding_window": WINDOW, "sliding_window_pattern": 2},
    "phi3": {"model_type": "phi3"},
    "phi3_windows": {"model_type": "phi3", "sliding_window": WINDOW, "tie_word_embeddings": True},
    "phi3_partial_rotary": {"model_type": "phi3", "rope_parameters": {"rope_theta": 1000.0, **_HALF_ROTARY}},
    "phi3_longrope": {"model_type": "phi3", "rope_parameters": _LONGROPE, "original_max_position_embeddings": 8},
    "gpt2": {"model_type": "gpt2", **_GPT2},
    "gpt2_untied": {"model_type": "gpt2", **_GPT2, "tie_word_embeddings": False, "activation_function": "relu"},
    "nemotron": {"model_type": "nemotron"},
    "nemotron_biases": {"model_type": "nemotron", **_BIASES, "tie_word_embeddings": True},
    "nemotron_h": {"model_type": "nemotron_h", **_HYBRID},
    "nemotron_h_runs": {
        "model_type": "nemotron_h",
        **_HYBRID,
        "hybrid_override_pattern": "MM*---",
        "num_hidden_layers": 6,
    },
    "nemotron_h_biases": {
        "model_type": "nemotron_h",
        **_HYBRID,
        "mlp_bias": True,
        "use_bias": True,
        "use_conv_bias": False,
    },
}
# One model for every family, for what need not be repeated with every option.
ONE_PER_FAMILY = tuple({fields["model_type"]: name for name, fields in reversed(MODELS.items())}.values())
SHARDED = ("llama", "qwen2_windows", "gpt2", "phi3")


def config(name: str, **changes: Any) -> Any:
    """A model's configuration, with fields of the table changed."""
    fields = {**({} if MODELS[name]["model_type"] == "gpt2" else _COMMON), **MODELS[name], **changes}
    return AutoConfig.for_model(**fields)


def ffn_layers(name: str) -> list[int]:
    """Indices of the layers that have an FFN."""
    pattern = MODELS[name].get("hybrid_override_pattern", "-" * LAYERS)
    return [layer for layer, kind in enumerate(pattern) if kind == "-"]


def build(name: str, *, seed: int = 0, **changes: Any) -> nn.Module:
    """A model in which no bias is 0, no norm is 1, and activations stay of order 1."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config(name, **changes), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(noise * HIDDEN**-0.5 if parameter.dim() == 2 else parameter + 0.2 * noise)
    return model


def save(model: nn.Module, directory: Path, *, max_shard_size: str = "5GB", dtype: torch.dtype = torch.float32) -> Path:
    """Save a model as a Hugging Face checkpoint."""
    model.to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    return directory


def token_ids() -> torch.Tensor:
    """Two sequences of token ids, [2, LENGTH]."""
    return torch.randint(4, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer of VOCAB tokens with the special tokens that the configs name, and a chat template."""
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    made = Tokenizer(BPE(unk_token="<unk>"))
    made.pre_tokenizer = Whitespace()
    text = ["def parse(self, argument): return argument", "class Action: pass", "import sys, os, re"]
    made.train_from_iterator(text, BpeTrainer(vocab_size=VOCAB, special_tokens=special, show_progress=False))
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    template = "{% for message in messages %}<s>{{ message.role }}: {{ message.content }}</s>{% endfor %}"
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=template, **named)
