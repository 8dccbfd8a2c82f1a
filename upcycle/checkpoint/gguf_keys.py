"""What the metadata keys of a GGUF model mean, as data: the configuration field of each, or that it changes nothing.

A file means what llama.cpp computes from it, and says it under its architecture's prefix; keys under other prefixes
(`general.`, `tokenizer.`, `quantize.`) change nothing that a model computes. Keys that are not here, nor among
`gguf_rope.ROPE_KEYS`, are refused. Names are llama.cpp's, without the prefix (`gguf.constants.Keys`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from upcycle.errors import SourceError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    Absent = Callable[[Mapping[str, Any]], Any]


@dataclass(frozen=True, kw_only=True)
class Key:
    """A key whose value changes what is computed.

    Attributes:
        fields: configuration fields that can hold it; the first that the model type has takes it.
        absent: what llama.cpp takes where the file does not say it, from the other values; None leaves transformers'
            default. Also what a model type without any of the fields computes.
        neutral: other values with which such a model type computes the same.
        zero_is_none: a field's None is written as 0.
        convert: from the key's value to the field's.
    """

    fields: tuple[str, ...] = ()
    absent: Absent | None = None
    neutral: tuple[Any, ...] = ()
    zero_is_none: bool = False
    convert: Callable[[Any], Any] = lambda value: value


def _scalar_of(scale: float) -> float:
    """The number whose inverse square root scales attention scores; configurations refuse one that is not whole."""
    exact = scale**-2
    return round(exact) if abs(exact - round(exact)) <= 1e-5 * exact else exact


def _head_scale(values: Mapping[str, Any]) -> float:
    return float(values["attention.key_length"] ** -0.5)


KEYS: Final[dict[str, Key]] = {
    "block_count": Key(fields=("num_hidden_layers",)),
    "context_length": Key(fields=("max_position_embeddings",)),
    "embedding_length": Key(fields=("hidden_size",)),
    "feed_forward_length": Key(fields=("intermediate_size", "n_inner")),
    "vocab_size": Key(fields=("vocab_size",)),
    "attention.head_count": Key(fields=("num_attention_heads",)),
    "attention.head_count_kv": Key(fields=("num_key_value_heads",), absent=lambda v: v["attention.head_count"]),
    "attention.key_length": Key(
        fields=("head_dim",), absent=lambda v: v["embedding_length"] // v["attention.head_count"]
    ),
    "attention.value_length": Key(absent=lambda v: v["attention.key_length"]),
    "attention.layer_norm_rms_epsilon": Key(fields=("rms_norm_eps", "norm_eps")),
    "attention.layer_norm_epsilon": Key(
        fields=("layer_norm_epsilon", "norm_epsilon", "norm_eps"),
        absent=lambda v: v.get("attention.layer_norm_rms_epsilon"),
    ),
    "attention.sliding_window": Key(fields=("sliding_window",), absent=lambda _: 0, zero_is_none=True),
    "attention.scale": Key(fields=("query_pre_attn_scalar",), absent=_head_scale, neutral=(0.0,), convert=_scalar_of),
    "attention.causal": Key(neutral=(True,)),
    "attention.clamp_kqv": Key(neutral=(0.0,)),
    "attention.max_alibi_bias": Key(neutral=(0.0,)),
    "attn_logit_softcapping": Key(fields=("attn_logit_softcapping",), neutral=(0.0,), zero_is_none=True),
    "final_logit_softcapping": Key(fields=("final_logit_softcapping",), neutral=(0.0,), zero_is_none=True),
    "embedding_length_out": Key(absent=lambda v: v["embedding_length"]),
    "embedding_scale": Key(neutral=(0.0, 1.0)),
    "residual_scale": Key(neutral=(0.0, 1.0)),
    "logit_scale": Key(neutral=(0.0, 1.0)),
    "use_parallel_residual": Key(neutral=(False,)),
    "expert_count": Key(neutral=(0,)),
    "expert_used_count": Key(neutral=(0,)),
    "nextn_predict_layers": Key(neutral=(0,)),
}
# Keys that every writer gives: without them transformers' defaults, one released model's, would come in.
REQUIRED: Final = ("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count")
NORM_EPSILONS: Final = ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon")
# Fields of special tokens, which are none where the file names none.
TOKENS: Final = ("bos_token_id", "eos_token_id", "pad_token_id")
WINDOW_PATTERN: Final = "attention.sliding_window_pattern"
# What a model computes of text does not depend on these.
WITHOUT_EFFECT: Final = frozenset({"pooling_type", "tensor_data_layout"})
WITHOUT_EFFECT_PREFIXES: Final = ("vision.", "mm.")
# Fields that give a place to biases, by the ending of a tensor that needs it.
BIASES: Final = {".attn_q.bias": "attention_bias", ".attn_output.bias": "attention_bias", ".ffn_up.bias": "mlp_bias"}


def _wide_scale(layers: int) -> Absent:
    """The scale by hidden size and heads instead of head size, which llama.cpp applies to one model by its layers."""

    def scale(values: Mapping[str, Any]) -> float:
        if values["block_count"] != layers:
            return _head_scale(values)
        return float((values["embedding_length"] // values["attention.head_count"]) ** -0.5)

    return scale


# What llama.cpp takes for a key that is not there, where an architecture has its own way.
ABSENT: Final[dict[str, dict[str, Absent]]] = {
    "gemma2": {"attention.scale": _wide_scale(46), "attention.sliding_window": lambda _: 4096},
    "gemma3": {"attention.scale": _wide_scale(62)},
}


def refusal(path: Path, found: str, expected: object = None) -> SourceError:
    """The error for what a file says and transformers' model cannot compute.

    Args:
        path: the file.
        found: the key or tensor, with its value.
        expected: what could have been computed.
    """
    return SourceError(
        f"{path} says something that transformers' model would not compute",
        found=found,
        expected=expected,
        remedy="use the model's safetensors files",
    )
