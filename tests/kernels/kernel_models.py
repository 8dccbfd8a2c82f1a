"""Tiny real models of every MoE type, and what they compute with a kernel."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from upcycle.kernels.select import install_kernel
from upcycle.modeling.configuration_upcycled_moe import UpcycledMoeConfig
from upcycle.modeling.modeling_upcycled_moe import UpcycledMoeForCausalLM

WIDTH, EXPERTS, TOP_K = 24, 6, 2
_COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts_per_tok": TOP_K,
}
_LOCAL = {"num_local_experts": EXPERTS, "intermediate_size": WIDTH}
_EXPERTS = {"num_experts": EXPERTS, "moe_intermediate_size": WIDTH}
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": _LOCAL,
    "olmoe": {"num_experts": EXPERTS, "intermediate_size": WIDTH},
    "flex_olmo": {"num_experts": EXPERTS, "intermediate_size": WIDTH},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 8},
    "qwen3_moe": {**_EXPERTS, "head_dim": 8},
    "granitemoeshared": {**_LOCAL, "shared_intermediate_size": 8},
    "upcycled_llama": {},
    "upcycled_nemotron": {},
}
_GATED = {"upcycled_llama": True, "upcycled_nemotron": False}


def build(name: str, dtype: torch.dtype = torch.float64, num_hidden_layers: int = 2) -> Any:
    """A model in which no bias is 0."""
    torch.manual_seed(0)
    common = {**_COMMON, "num_hidden_layers": num_hidden_layers}
    if name in _GATED:
        dense = {key: value for key, value in common.items() if key != "num_experts_per_tok"}
        text_config = AutoConfig.for_model(name.removeprefix("upcycled_"), intermediate_size=WIDTH, **dense)
        config = UpcycledMoeConfig(
            text_config=text_config,
            moe_layers=list(range(num_hidden_layers)),
            ffn_path="model.layers.{layer}.mlp",
            gated=_GATED[name],
            hidden_act="silu" if _GATED[name] else "relu2",
            ffn_bias=True,
            num_experts_per_tok=TOP_K,
            **_EXPERTS,
        )
        model: Any = UpcycledMoeForCausalLM(config)
    else:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **common | MODELS[name]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.to(dtype).eval()


def gradients(model: Any, kernel: str) -> dict[str, torch.Tensor]:
    """Logits and gradients of every parameter with a kernel."""
    install_kernel(model, kernel, device=model.device, dtype=model.dtype)
    model.zero_grad()
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1)).to(model.device)
    output = model(ids, labels=ids)
    output.loss.backward()
    named = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": output.logits.detach(), **named}
