"""What Megatron-Bridge cannot take: types, settings of a model, of its training. Each is refused by name.

Sources: the bridges of megatron-bridge 0.6.2 (`models/qwen/qwen3_moe_bridge.py`, `models/olmoe/`), and megatron-core
0.19.2 (`transformer/transformer_config.py`, `transformer/moe/router.py`). Attention within documents: the mask of
`reset_attention_mask` does not reach the model (`training/gpt_step.py` of the bridge), and Transformer Engine reads no
mask in layers that are causal (`models/gpt/gpt_layer_specs.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from upcycle.arch.head import REWARD, head_of
from upcycle.errors import ConfigError, SourceError
from upcycle.models.load import load_tokenizer_from
from upcycle.routing.config import Schedule

if TYPE_CHECKING:
    from pathlib import Path

    from upcycle.models.moe import MoeDescription
    from upcycle.train.config import TrainConfig

BRIDGE, CORE, TRANSFORMERS = "0.6.2", "0.19.2", "5.12.1"
TYPES = ("qwen3_moe", "olmoe", "mixtral")
OWN_BRIDGES = {"mixtral": "mixtral_bridge"}  # modules that travel with the recipe


def check_type(model_type: str | None) -> None:
    """Check that there is a bridge for a type.

    Raises:
        SourceError: there is none.
    """
    if model_type not in TYPES:
        raise SourceError(
            f"Megatron-Bridge {BRIDGE} has no bridge for the model's type",
            found=f"model_type={model_type}",
            expected=", ".join(TYPES),
            remedy="convert with target=" + " or ".join(TYPES),
        )


def check_model(config: Any, moe: MoeDescription) -> None:
    """Check that a model's bridge takes over everything that its config.json says.

    Raises:
        SourceError: it does not; names the field.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    sliding = getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None)
    lost = {
        "rope_type": rope.get("rope_type", "default") not in ("default", None) and rope["rope_type"],
        "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0) != 1.0 and rope["partial_rotary_factor"],
        "sliding_window": sliding,
        "architectures": head_of(config.to_dict()) is REWARD and config.architectures,
        "attention_bias": getattr(config, "attention_bias", False),
        "hidden_act": config.hidden_act != "silu" and config.hidden_act,
        "layers without experts": moe.layer_count - len(moe.layers),
        "num_experts_per_tok": moe.top_k == 1 and moe.router_order == "topk_softmax" and "1 with topk_softmax",
    }
    if moe.model_type == "olmoe":
        lost |= {
            "clip_qkv": getattr(config, "clip_qkv", None),
            "tie_word_embeddings": config.tie_word_embeddings,
            "num_key_value_heads": config.num_key_value_heads != config.num_attention_heads
            and config.num_key_value_heads,
        }
    for name, found in lost.items():
        if found:
            raise SourceError(
                f"Megatron-Bridge {BRIDGE} cannot take {name} of {moe.model_type}",
                found=f"{name}={found}",
                remedy="train it with this library: upcycle train model=checkpoint",
            )


def check_tokenizer(directory: Path) -> None:
    """Check that a checkpoint has a tokenizer that says where a document ends.

    Raises:
        SourceError: there is none, or it does not.
    """
    tokenizer = load_tokenizer_from(directory)
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:  # what transformers makes where there are no files
        raise SourceError(
            "the checkpoint has no tokenizer, which a recipe tokenizes text with",
            found=directory,
            expected="tokenizer.json, tokenizer_config.json",
        )
    if tokenizer.eos_token_id is None:
        raise SourceError(
            "the tokenizer has no end-of-text token, which a recipe needs between documents",
            found=directory,
            remedy="set eos_token in tokenizer_config.json",
        )


def check_training(config: TrainConfig) -> None:
    """Check that Megatron-Core can express how a model is trained.

    Raises:
        ConfigError: it cannot; names the option.
    """
    router, balance, optim = config.router, config.balance, config.optim
    beyond = {
        "router.noisy_top_k": router.noisy_top_k,
        "router.expert_choice": router.expert_choice,
        "router.release": router.release and router.release.then,
        "balance.aux_loss": isinstance(balance.aux_loss, Schedule) and "a schedule",
        "balance.z_loss": isinstance(balance.z_loss, Schedule) and "a schedule",
        "optim.router_lr": optim.router_lr != 1 and optim.router_lr,
        "optim.expert_lr": optim.expert_lr != 1 and optim.expert_lr,
        "distill.weight": config.distill.weight,
        "data.document_attention": config.data.document_attention,
    }
    for option, found in beyond.items():
        if found:
            raise ConfigError(
                f"a recipe for Megatron-Bridge cannot express {option}",
                found=f"{option}={found}",
                expected="the option's default",
                remedy="train it with this library",
            )
