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
from typing import TYPE_CHECKING, Any

import torch
from megatron.bridge import AutoBridge
from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.gpt_provider import local_layer_spec
from megatron.bridge.models.hybrid.hybrid_provider import HybridModelProvider
from megatron.bridge.models.olmoe.olmoe_provider import OLMoESelfAttention, olmoe_layer_spec
from megatron.bridge.training.config import runtime_config_update
from megatron.core import parallel_state
from megatron.core.models.hybrid import hybrid_block
from megatron.core.post_training.modelopt.hybrid import model_specs
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.moe import moe_layer
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

if TYPE_CHECKING:
    from collections.abc import Iterator

DEGREES = ("tensor_model", "context", "pipeline_model", "expert_tensor", "expert_model")
SETTINGS = {
    "model": "num_moe_experts moe_router_topk moe_ffn_hidden_size moe_shared_expert_intermediate_size moe_latent_size "
    "moe_router_score_function moe_router_pre_softmax moe_router_topk_scaling_factor moe_router_enable_expert_bias "
    "moe_router_bias_update_rate moe_router_num_groups moe_router_group_topk moe_router_dtype "
    "moe_router_load_balancing_type moe_aux_loss_coeff gated_linear_unit num_layers attention_dropout hidden_dropout "
    "bf16 seq_length",
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


class TELinear(torch.nn.Linear):
    """A projection that every rank has whole, under the name by which the bridge knows it."""

    parallel_mode = "duplicated"

    def __init__(self, size_in: int, size_out: int, **_: Any) -> None:
        super().__init__(size_in, size_out, bias=False)

    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x), None


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
    config.model.moe_permute_fusion = config.model.apply_rope_fusion = False  # kernels of Transformer Engine
    os.environ["WORLD_SIZE"] = "8"
    runtime_config_update(config)
    found = {part: {name: getattr(getattr(config, part), name) for name in SETTINGS[part].split()} for part in SETTINGS}
    degrees = [getattr(config.model, f"{name}_parallel_size") for name in DEGREES]
    pattern = getattr(config.model, "hybrid_layer_pattern", None)
    return {**found, "degrees": [*degrees, config.data_parallel_size], "pattern": pattern}


def logits(recipe: Any) -> dict[str, Any]:
    """The largest logit of transformers' model, how far Megatron's are off, and those of wrong models."""
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
        off = (run(model, tokens) - expected).abs().max().item()
        wrong = {name: (run(model, tokens) - expected).abs().max().item() for name in mutants(provider, model)}
    returned = {name: tensor for name, tensor in bridge.export_hf_weights([model], cpu=True, show_progress=False)}
    stored = {name: tensor for file in recipe.HERE.glob("*.safetensors") for name, tensor in load_file(file).items()}
    same = [name for name in returned.keys() & stored.keys() if torch.equal(returned[name], stored[name])]
    back = sorted({*returned, *stored} - {*same})
    return {"largest": expected.abs().max().item(), "off": off, "mutants": wrong, "differing_back": back}


def mutants(provider: Any, model: Any) -> Iterator[str]:
    """Names of what is wrong with the model, one thing after the other, until the next one is asked for."""
    hybrid, layers = isinstance(provider, HybridModelProvider), model.decoder.layers
    name, value = ("topk_scaling_factor", 1.0) if hybrid else ("pre_softmax", not provider.moe_router_pre_softmax)
    mixture = next(layer.mlp for layer in layers if hasattr(getattr(layer, "mlp", None), "experts"))
    swapped = {"gate and up, or halves of up, swapped": mixture.experts.local_experts[0].linear_fc1.weight}
    if hybrid:
        scan = layers[0].mixer
        swapped |= {"biases for choosing": mixture.router.expert_bias, "decay": scan.A_log, "gate": scan.in_proj.weight}
        if provider.moe_latent_size:
            swapped["into the latent size"] = mixture.fc1_latent_proj.weight
    kept = getattr(provider, f"moe_router_{name}")
    setattr(provider, f"moe_router_{name}", value)
    yield name
    setattr(provider, f"moe_router_{name}", kept)
    for name, weight in swapped.items():
        kept = weight.clone()
        weight.copy_(torch.cat(weight.chunk(2)[::-1]))
        yield name
        weight.copy_(kept)


def on_cpu(provider: Any) -> Any:
    """The model of a provider, whole, of Megatron-Core's own layers."""
    if isinstance(provider, HybridModelProvider):
        provider.hybrid_stack_spec = hybrid_layers()
        provider.moe_shared_expert_overlap = False  # CUDA streams again
        provider.attention_backend = AttnBackend.auto  # as of the other types: it is set once for a process
    else:
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
    provider.apply_rope_fusion = False
    provider.persist_layer_norm = provider.gradient_accumulation_fusion = False
    provider.use_cpu_initialization = provider.perform_initialization = True
    provider.moe_token_dispatcher_type = "allgather"  # the one without CUDA streams
    provider.params_dtype = provider.autocast_dtype = provider.pipeline_dtype = torch.float32
    provider._pg_collection = ProcessGroupCollection.use_mpu_process_groups()
    provider.finalize()
    return provider.provide(True, True).eval()


def hybrid_layers() -> Any:
    """The kinds of layers of a hybrid, with torch's norms and projections where Megatron-Core has none of its own."""
    model_specs.Norm = hybrid_block.TENorm = WrappedTorchNorm
    moe_layer.HAVE_TE, moe_layer.TELinear = True, TELinear
    return model_specs.get_hybrid_stack_modelopt_spec(local_core_attention=True)


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
