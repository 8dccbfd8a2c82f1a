"""Everything of a dense model that is not its FFNs, in the terms in which a MoE type can or cannot express it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Windows = Literal["none", "uniform", "mixed"]
Norm = Literal["rmsnorm", "rmsnorm_plus_one", "layernorm", "layernorm_plus_one", "layernorm_without_weights"]
NormPlacement = Literal["pre", "post", "sandwich"]
QkNorm = Literal["none", "head", "full"]
AttentionBias = Literal["none", "qkv", "qkvo"]


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """What attention, norms, positions and embeddings do.

    Attributes:
        norm: kind of the layers' norm.
        norm_placement: before the block, after it, or both.
        qk_norm: norm of queries and keys: none, per head, or over all heads together.
        attention_bias: which projections have a bias.
        windows: sliding window of each layer in tokens, 0 where attention is full.
        extras: features that no native MoE type has, each in words.
    """

    norm: Norm = "rmsnorm"
    norm_placement: NormPlacement = "pre"
    qk_norm: QkNorm = "none"
    attention_bias: AttentionBias = "none"
    windows: tuple[int, ...]
    extras: tuple[str, ...] = ()


def head_size(config: Any) -> int:
    """Size of an attention head of a transformers configuration."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def window_kind(windows: tuple[int, ...]) -> Windows:
    """Whether there are sliding windows: on no layer, the same on all, or any mixture."""
    if not any(windows):
        return "none"
    return "uniform" if len(set(windows)) == 1 else "mixed"


def optional_bias(config: Any) -> AttentionBias:
    """Biases on all four projections where the config's `attention_bias` is set, else none."""
    return "qkvo" if getattr(config, "attention_bias", False) else "none"


def usual_mamba_biases(config: Any) -> bool:
    """Whether Mamba-2, where there is any, has a bias in its convolution and nowhere else, as in published models."""
    return bool(getattr(config, "use_conv_bias", True)) and not getattr(config, "use_bias", False)


def layer_windows(config: Any) -> tuple[int, ...]:
    """Sliding window of each layer in tokens (0 = full attention) of a transformers configuration."""
    window = getattr(config, "sliding_window", None) or 0
    layers: int = config.num_hidden_layers
    layer_types = getattr(config, "layer_types", None)
    if layer_types:
        return tuple(window if kind == "sliding_attention" else 0 for kind in layer_types)
    return (window,) * layers


def rope_type(config: Any) -> str:
    """Kind of rotary scaling of a transformers configuration; "default" where there is none."""
    return str((getattr(config, "rope_parameters", None) or {}).get("rope_type", "default"))


def rope_extras(config: Any) -> tuple[str, ...]:
    """The rotary features that no native MoE type reads."""
    factor = (getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0)
    return (f"partial_rotary_factor={factor}",) if factor != 1.0 else ()
