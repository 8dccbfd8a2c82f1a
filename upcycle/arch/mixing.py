"""What mixes positions in each layer of a model, and what that computes beside products with weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from upcycle.arch.backbone import head_size
from upcycle.arch.families import FAMILIES

if TYPE_CHECKING:
    from upcycle.arch.family import Mixer

# FLOPs per channel and state of Mamba-2's scan, as Megatron-LM counts them.
SCAN = 7


def mixers(config: Any) -> tuple[Mixer | None, ...]:
    """The mixer of every layer of a dense model or a MoE, from its transformers configuration."""
    family, layers = FAMILIES.get(config.model_type), int(config.num_hidden_layers)
    if family is None:  # a MoE type whose layers are all alike
        alike: tuple[Mixer, ...] = ("attention",)
        return alike * layers
    return tuple(family.kinds[kind].mixer for kind in family.layer_kinds(config.to_dict(), layers))


def mixing_flops(config: Any, *, sequence_length: int) -> int:
    """Forward FLOPs per token of scores and of what follows from them, of scans and convolutions, over all layers.

    Attention counts 4 * sequence_length * heads * head size, the whole square.
    """
    found = mixers(config)
    attention = 4 * sequence_length * config.num_attention_heads * head_size(config)
    flops: int = found.count("attention") * attention
    if "mamba2" in found:
        sizes = FAMILIES[config.model_type].symbols(config)
        scan = scan_flops(channels=sizes["I"], states=sizes["N"], convolved=sizes["C"], kernel=sizes["W"])
        flops += found.count("mamba2") * scan
    return flops


def scan_flops(*, channels: int, states: int, convolved: int, kernel: int) -> int:
    """Forward FLOPs per token of a Mamba-2 layer's convolution and scan."""
    return 2 * convolved * kernel + SCAN * channels * states


def cache_bytes(config: Any, *, element: int) -> tuple[int, int]:
    """Bytes that generating keeps: keys and values for every token, and Mamba-2's states for a sequence.

    Args:
        config: transformers configuration.
        element: bytes of one; the states of scans are float32.
    """
    found = mixers(config)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    pairs = found.count("attention") * 2 * heads * head_size(config) * element
    if "mamba2" not in found:
        return pairs, 0
    sizes = FAMILIES[config.model_type].symbols(config)
    states = 4 * sizes["I"] * sizes["N"] + element * sizes["C"] * sizes["W"]
    return pairs, found.count("mamba2") * states
