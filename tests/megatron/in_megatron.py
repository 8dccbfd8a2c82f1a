"""Builds recipes with the real packages and runs their models: without_gpu.py in_megatron.py DIR ..., prints JSON.

The models are made of Megatron-Core's own layers, in float32, on one process, and loaded through the recipe's bridge;
the names that these layers have instead of Transformer Engine's are put into the bridge's mappings.
"""

from __future__ import annotations

import copy
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from megatron.bridge import AutoBridge
from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.gpt_provider import local_layer_spec
from megatron.bridge.models.olmoe.olmoe_provider import OLMoESelfAttention, olmoe_layer_spec
from megatron.bridge.training.config import runtime_config_update
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from transformers import AutoModelForCausalLM

DEGREES = ("tensor_model", "context", "pipeline_model", "expert_tensor", "expert_model")
SETTINGS = {
    "model": "num_moe_experts moe_router_topk moe_ffn_hidden_size moe_router_pre_softmax moe_router_dtype "
    "moe_router_load_balancing_type moe_aux_loss_coeff attention_dropout hidden_dropout bf16 seq_length",
    "train": "train_iters global_batch_size micro_batch_size",
    "validation": "eval_interval eval_iters",
    "optimizer": "optimizer lr min_lr weight_decay adam_beta1 adam_beta2 adam_eps clip_grad bf16",
    "scheduler": "lr_decay_style lr_warmup_steps lr_decay_steps wsd_decay_steps",
    "dataset": "sequence_length blend blend_per_split",
}
LOCAL = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.experts.linear_fc1.weight*": "mlp.experts.local_experts.*.linear_fc1.weight",
    "mlp.experts.linear_fc2.weight*": "mlp.experts.local_experts.*.linear_fc2.weight",
}


def main(directories: list[Path]) -> None:
    recipes = {directory.name: imported(directory) for directory in directories}
    report = {name: settings(recipe) for name, recipe in recipes.items()}
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    parallel_state.initialize_model_parallel()
    for name, recipe in recipes.items():
        report[name] |= logits(recipe)
    print(json.dumps(report))


def imported(directory: Path) -> Any:
    """A directory's recipe.py."""
    sys.modules.pop("recipe", None)
    sys.path.insert(0, str(directory))
    recipe = importlib.import_module("recipe")
    sys.path.remove(str(directory))
    return recipe


def settings(recipe: Any) -> dict[str, Any]:
    """What a recipe's configuration holds once Megatron has completed and checked it for 8 GPUs."""
    config = recipe.config()
    config.model.moe_permute_fusion = False  # a kernel of Transformer Engine
    os.environ["WORLD_SIZE"] = "8"
    runtime_config_update(config)
    found = {part: {name: getattr(getattr(config, part), name) for name in SETTINGS[part].split()} for part in SETTINGS}
    degrees = [getattr(config.model, f"{name}_parallel_size") for name in DEGREES]
    return {**found, "degrees": [*degrees, config.data_parallel_size]}


def logits(recipe: Any) -> dict[str, Any]:
    """The largest logit of transformers' model, how far Megatron's are off, and those of two wrong models."""
    provider = recipe.model()
    bridge = AutoBridge.from_hf_pretrained(str(recipe.HERE), dtype=torch.float32)
    model = on_cpu(provider)
    kind = type(bridge._model_bridge)
    mappings = kind.mapping_registry(bridge._model_bridge).mappings
    kind.mapping_registry = lambda self: MegatronMappingRegistry(*(local(each) for each in mappings))
    bridge.load_hf_weights([model])
    tokens = torch.randint(0, provider.vocab_size, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(recipe.HERE, dtype=torch.float32).eval()(tokens).logits
        off = {"off": run(model, tokens) - expected}
        provider.moe_router_pre_softmax = not provider.moe_router_pre_softmax
        off["off_in_the_other_order"] = run(model, tokens) - expected
        provider.moe_router_pre_softmax = not provider.moe_router_pre_softmax
        gate_and_up = model.decoder.layers[0].mlp.experts.local_experts[0].linear_fc1.weight
        gate_and_up.copy_(torch.cat(gate_and_up.chunk(2)[::-1]))
        off["off_with_gate_and_up_swapped"] = run(model, tokens) - expected
    return {"largest": expected.abs().max().item(), **{name: each.abs().max().item() for name, each in off.items()}}


def on_cpu(provider: Any) -> Any:
    """The model of a provider, whole, of Megatron-Core's own layers."""
    own_attention = provider.transformer_layer_spec is olmoe_layer_spec

    def layers(config: Any) -> Any:
        spec = local_layer_spec(config)
        if own_attention:
            spec.submodules.self_attention.module = OLMoESelfAttention
        return spec

    provider.transformer_layer_spec = layers
    for name in DEGREES:
        setattr(provider, f"{name}_parallel_size", 1)
    provider.sequence_parallel = provider.bf16 = provider.moe_grouped_gemm = provider.moe_permute_fusion = False
    provider.persist_layer_norm = provider.gradient_accumulation_fusion = False
    provider.use_cpu_initialization = provider.perform_initialization = True
    provider.moe_token_dispatcher_type = "allgather"  # the one without CUDA streams
    provider.params_dtype = provider.autocast_dtype = provider.pipeline_dtype = torch.float32
    provider._pg_collection = ProcessGroupCollection.use_mpu_process_groups()
    provider.finalize()
    return provider.provide(True, True).eval()


def local(mapping: Any) -> Any:
    """A mapping with the names of Megatron-Core's own layers."""
    made = copy.copy(mapping)
    for fused, own in LOCAL.items():
        made.megatron_param = made.megatron_param.replace(fused, own)
    return made


def run(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Logits, [sequences, tokens, vocabulary]."""
    length = tokens.shape[1]
    mask = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
    found: torch.Tensor = model(tokens, torch.arange(length).expand_as(tokens), mask)
    return found


if __name__ == "__main__":
    main([Path(each) for each in sys.argv[1:]])
