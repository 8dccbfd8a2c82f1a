"""What Megatron-Bridge cannot take: types, settings of a model, of its training. Each is refused by name.

Sources: the bridges of megatron-bridge 0.6.2 (`models/qwen/qwen3_moe_bridge.py`, `models/olmoe/`, `models/nemotronh/`,
`models/hybrid/hybrid_provider.py`), and megatron-core 0.19.2 (`transformer/transformer_config.py`,
`transformer/moe/router.py`, `transformer/moe/moe_utils.py`, `ssm/mamba_mixer.py`). Attention within documents: the mask
of `reset_attention_mask` does not reach the model (`training/gpt_step.py` of the bridge), and Transformer Engine reads
no mask in layers that are causal (`models/gpt/gpt_layer_specs.py`).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from upcycle.arch.families import FAMILIES
from upcycle.arch.head import REWARD, head_of
from upcycle.errors import ConfigError, SourceError
from upcycle.models.load import load_tokenizer_from
from upcycle.models.moe import target_of
from upcycle.routing.config import Schedule

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from upcycle.models.moe import MoeDescription
    from upcycle.train.config import TrainConfig

BRIDGE, CORE, TRANSFORMERS = "0.6.2", "0.19.2", "5.12.1"
TYPES = ("qwen3_moe", "olmoe", "mixtral", "nemotron_h")
OWN_BRIDGES = {"mixtral": "mixtral_bridge"}  # modules that travel with the recipe
KERNELS = {"nemotron_h": ("mamba-ssm==2.3.2.post1", "causal-conv1d==1.7.0")}  # what Megatron-Core imports for it
ACTIVATIONS = {"nemotron_h": "relu2"}  # where it is not silu
# What Megatron-Core's Mamba-2 layer computes with, whatever config.json says.
KERNEL, EPSILON = 4, 1e-5
BY_LIBRARY = "train it with this library: upcycle train model=checkpoint"
REMEDIES = {
    "n_group": "set n_group and topk_group to 1 in config.json to choose among all experts from now on",
    "num_nextn_predict_layers": "convert with mtp=none, or train it with this library",
}


def check_type(fields: Mapping[str, Any]) -> None:
    """Check that there is a bridge for the type of a model with these fields in config.json, and that it has experts.

    Raises:
        SourceError: there is none, or it has none.
    """
    model_type = fields.get("model_type")
    if model_type not in TYPES:
        raise SourceError(
            f"Megatron-Bridge {BRIDGE} has no bridge for the model's type",
            found=f"model_type={model_type}",
            expected=", ".join(TYPES),
            remedy="convert with target=" + " or ".join(TYPES),
        )
    if target_of(fields) is None:
        raise SourceError(
            "a recipe is for a mixture of experts, and the model has none",
            found=f"model_type={model_type} without layers of experts",
            remedy=f"convert it with target={model_type}",
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
        **_activation(config, moe),
        "layers without experts": not moe.target.family and moe.layer_count - len(moe.layers),
        "num_experts_per_tok": moe.top_k == 1 and moe.renormalise and f"1 with {moe.router_order}",
    }
    if moe.target.family:
        lost |= _of_hybrids(config, moe)
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
                f"a recipe for Megatron-Bridge {BRIDGE} cannot take {name} of {moe.model_type}",
                found=f"{name}={found}",
                remedy=REMEDIES.get(name, BY_LIBRARY),
            )


def _activation(config: Any, moe: MoeDescription) -> dict[str, Any]:
    field = FAMILIES[moe.target.family].activation if moe.target.family else "hidden_act"
    found = getattr(config, field)
    return {field: found != ACTIVATIONS.get(moe.model_type, "silu") and found}


def _of_hybrids(config: Any, moe: MoeDescription) -> dict[str, Any]:
    """What would be lost of a model of Mamba-2, attention and mixtures, one to a layer, whose routers take sigmoids."""
    groups, chosen = moe.limits
    limits = tuple(config.time_step_limit or (0.0, math.inf))
    return {
        # Megatron divides sigmoids by their sum wherever K > 1, and scores groups by their best K / topk_group.
        "norm_topk_prob": moe.top_k > 1 and not moe.renormalise and "false",
        "n_group": groups > chosen and moe.top_k // chosen != 2 and f"{groups}, topk_group={chosen}",
        "num_nextn_predict_layers": config.num_nextn_predict_layers,
        "tie_word_embeddings": config.tie_word_embeddings,
        "mlp_bias": config.mlp_bias,
        "use_bias": config.use_bias,
        "use_conv_bias": not config.use_conv_bias and "false",
        "conv_kernel": config.conv_kernel != KERNEL and config.conv_kernel,
        "mamba_hidden_act": config.mamba_hidden_act != "silu" and config.mamba_hidden_act,
        "layer_norm_epsilon": config.layer_norm_epsilon != EPSILON and config.layer_norm_epsilon,
        "time_step_limit": limits != (0.0, math.inf) and limits,
        "hidden_dropout": config.hidden_dropout,
    }


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
        "balance.bias_update": isinstance(balance.bias_update, Schedule) and "a schedule",
        "optim.router_lr": optim.router_lr != 1 and optim.router_lr,
        "optim.expert_lr": optim.expert_lr != 1 and optim.expert_lr,
        "distill.weight": config.distill.weight,
        "mtp.start": config.mtp.start != "none" and config.mtp.start,
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
