"""What the tests of recipes share: tiny checkpoints of types with a bridge, requests, what a recipe sets."""

from __future__ import annotations

import ast
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from upcycle.data.config import MIXTURE, DataConfig, DomainConfig
from upcycle.parallel.config import FoldingConfig
from upcycle.parallel.gpu import Gpu
from upcycle.train.config import ExportConfig, RecipeConfig, TrainConfig

EXPERTS = 8
# Where transformers 5.12 has no kernels of mamba-ssm, as the tests have none, it loses states between chunks, and has a
# least time step, which the kernels have not: one chunk for all tokens of a test, and almost no least.
WITHOUT_KERNELS = {"chunk_size": 32, "time_step_min": 1e-9}
TYPES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": EXPERTS, "moe_intermediate_size": 12, "head_dim": 8, "norm_topk_prob": True},
    "olmoe": {"num_experts": EXPERTS, "num_key_value_heads": 4, "norm_topk_prob": False},
    "mixtral": {"num_local_experts": EXPERTS, "sliding_window": None},
    "nemotron_h": {
        "hybrid_override_pattern": "ME*E-M",
        "num_hidden_layers": 6,
        "head_dim": 8,
        "n_groups": 2,
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        **WITHOUT_KERNELS,
        "n_routed_experts": EXPERTS,
        "moe_intermediate_size": 12,
        "moe_shared_expert_intermediate_size": 20,
        "moe_latent_size": 16,
        "routed_scaling_factor": 2.5,
    },
}


def checkpoint(model_type: str, directory: Path, *, tokenizer: Path, **fields: Any) -> Path:
    """A checkpoint with random weights, large enough that every tensor matters, and the tokenizer of another one."""
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2}
    given: dict[str, Any] = {**sizes, **TYPES[model_type], **fields}
    config = AutoConfig.for_model(model_type, **given)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith(("dt_bias", ".D")):
            torch.nn.init.normal_(parameter, mean=1, std=0.2)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            torch.nn.init.normal_(buffer, std=0.1)
    models.save(model, directory)
    for file in tokenizer.glob("tokenizer*"):
        shutil.copy(file, directory)
    return directory


def with_mixture(config: TrainConfig, text: Path, *, held_out: float) -> TrainConfig:
    """A run's options with two domains, code and rest, of weights 3 and 0.5."""
    domains = {
        "code": DomainConfig(name="text", files=f"{text}/[a-c]*.txt", weight=3.0),
        "rest": DomainConfig(name="text", files=f"{text}/[d-z]*.txt", weight=0.5),
    }
    data = DataConfig(name=MIXTURE, domains=domains, held_out=held_out, cache_dir=config.data.cache_dir)
    return replace(config, data=data)


def request(output: Path, *, run: Path | None = None, moe: Path | None = None, **changes: Any) -> ExportConfig:
    """Options of a recipe of 10 steps of 64 sequences, on 8 GPUs."""
    given = {
        "parallel": FoldingConfig(tp=None, cp=None, pp=None, etp=None, ep=None),
        "gpu": Gpu(name="h100", memory=80e9, flops=1e15, hbm=3e12, nvlink=450e9, network=50e9, gpus_per_node=8),
        "steps": 10,
        "workload": RecipeConfig(sequences=64),
    }
    return ExportConfig(
        run=str(run) if run else None,
        moe=str(moe) if moe else None,
        output=str(output),
        checkpoint="last",
        dtype="float32",
        overwrite=False,
        format="megatron-bridge",
        **{**given, **changes},
    )


def assignments(recipe: Path | ast.Module) -> dict[str, Any]:
    """The literal values in a recipe, by the name of the variable, attribute or keyword that they are given to."""
    tree = ast.parse(recipe.read_text()) if isinstance(recipe, Path) else recipe
    pairs: list[tuple[str, ast.expr]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            target = node.targets[0]
            pairs.append((target.attr if isinstance(target, ast.Attribute) else ast.unparse(target), node.value))
        elif isinstance(node, ast.keyword) and node.arg:
            pairs.append((node.arg, node.value))
    found = {}
    for name, value in pairs:
        try:
            found[name] = ast.literal_eval(value)
        except ValueError:
            continue
    return found
