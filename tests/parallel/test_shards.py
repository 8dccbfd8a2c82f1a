"""What a rank holds against what transformers gives it, in torch's fake process group, on meta tensors. Tolerance 0."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed as dist
from published import gpu, workload
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.distributed import DistributedConfig

from upcycle.modeling.configuration_upcycled_moe import UpcycledMoeConfig
from upcycle.modeling.modeling_upcycled_moe import UpcycledMoeForCausalLM
from upcycle.parallel.check import checked_layout
from upcycle.parallel.config import ParallelConfig
from upcycle.parallel.memory import memory
from upcycle.parallel.sizes import ModelSizes
from upcycle.parallel.step import Step

if TYPE_CHECKING:
    from collections.abc import Iterator

COMMON = {
    "vocab_size": 1000,
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_experts_per_tok": 4,
}
SIZES = {
    "layers": 2,
    "moe_layers": 2,
    "hidden": 256,
    "heads": 8,
    "kv_heads": 4,
    "head_size": 32,
    "ffn_width": 512,
    "top_k": 4,
    "vocab": 1000,
}


@dataclass(frozen=True)
class Model:
    """A tiny model, as transformers makes it and as planning sees it."""

    kind: type
    config: object
    sizes: ModelSizes


def qwen3(experts: int) -> Model:
    fields = {**COMMON, "head_dim": 32, "intermediate_size": 512, "moe_intermediate_size": 96, "num_experts": experts}
    sizes = ModelSizes(**SIZES, experts=experts, expert_width=96, qk_norm="head")
    return Model(Qwen3MoeForCausalLM, Qwen3MoeConfig(**fields), sizes)


def mixtral() -> Model:
    config = MixtralConfig(**COMMON, intermediate_size=160, num_local_experts=16)
    return Model(MixtralForCausalLM, config, ModelSizes(**SIZES, experts=16, expert_width=160))


def olmoe() -> Model:
    """With norms over all heads of queries, and of keys."""
    config = OlmoeConfig(**{**COMMON, "num_key_value_heads": 8}, intermediate_size=96, num_experts=16)
    sizes = {**SIZES, "kv_heads": 8, "experts": 16, "expert_width": 96, "qk_norm": "full"}
    return Model(OlmoeForCausalLM, config, ModelSizes(**sizes))


def upcycled() -> Model:
    """Of a Llama, with a dense layer and a shared expert."""
    sizes = {name: size for name, size in COMMON.items() if name != "num_experts_per_tok"}
    config = UpcycledMoeConfig(
        text_config={"model_type": "llama", **sizes, "intermediate_size": 512},
        num_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=96,
        moe_layers=[1],
        ffn_path="model.layers.{layer}.mlp",
        gated=True,
        hidden_act="silu",
        shared_expert_intermediate_size=192,
    )
    planned = {**SIZES, "moe_layers": 1, "experts": 16, "expert_width": 96, "shared_width": 192}
    return Model(UpcycledMoeForCausalLM, config, ModelSizes(**planned))


def qwen2() -> Model:
    """With a dense layer, and a shared expert, whose gate of 1 x 256 planning leaves out."""
    fields = {"intermediate_size": 512, "moe_intermediate_size": 96, "num_experts": 32, "mlp_only_layers": [0]}
    config = Qwen2MoeConfig(**COMMON, **fields, shared_expert_intermediate_size=192)
    sizes = {**SIZES, "moe_layers": 1, "experts": 32, "expert_width": 96, "shared_width": 192, "qkv_bias": True}
    return Model(Qwen2MoeForCausalLM, config, ModelSizes(**sizes))


@pytest.fixture
def _no_group(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("LOCAL_RANK", "0")
    yield
    dist.destroy_process_group()


def local_elements(model: Model, parallel: ParallelConfig, *, rank: int) -> int:
    """Elements of all parameters that transformers leaves on a rank."""
    layout = {"fsdp_size": parallel.fsdp, "tp_size": parallel.tp, "ep_size": parallel.ep}
    config = DistributedConfig(**layout, dp_replicate_size=parallel.replicate)
    world = parallel.replicate * (parallel.fsdp or 1) * parallel.tp
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    config, _, mesh = model.kind.prepare_distribute_model(config)
    with torch.device("meta"):
        made = model.kind(model.config)
    made = model.kind.maybe_distribute_model(made, config, mesh)
    return sum(parameter.to_local().numel() for name, parameter in made.named_parameters() if "expert_gate" not in name)


def planned(model: Model, parallel: ParallelConfig) -> Step:
    machine = replace(gpu("h100"), gpus_per_node=1)
    nodes = parallel.replicate * (parallel.fsdp or 1) * parallel.tp
    step = workload(sequences=nodes)
    layout = checked_layout(parallel, model.sizes, step, machine, nodes)
    return Step(sizes=model.sizes, layout=layout, workload=step)


LAYOUTS = {
    "fsdp8": (qwen3(16), (1, 8, 1, 1)),
    "fsdp8 ep4": (qwen3(16), (1, 8, 1, 4)),
    "fsdp4 tp2 ep4": (qwen3(16), (1, 4, 2, 4)),
    "fsdp4 tp2 ep8": (mixtral(), (1, 4, 2, 8)),
    "hsdp 2 x fsdp3 tp2 ep2": (qwen3(12), (2, 3, 2, 2)),
    "fsdp8 tp4 ep16, dense layer and shared expert": (qwen2(), (1, 8, 4, 16)),
    "fsdp4 tp2 ep8, norms over all heads": (olmoe(), (1, 4, 2, 8)),
    "hsdp 2 x fsdp4 tp2 ep4, upcycled_moe": (upcycled(), (2, 4, 2, 4)),
    "1,024 ranks: hsdp 8 x fsdp64 tp2 ep8": (qwen3(128), (8, 64, 2, 8)),
}


@pytest.mark.usefixtures("_no_group")
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_first_rank_holds_what_was_planned(name):
    model, (replicate, fsdp, tp, ep) = LAYOUTS[name]
    parallel = ParallelConfig(replicate=replicate, fsdp=fsdp, tp=tp, ep=ep)
    found = memory(planned(model, parallel))
    elements = local_elements(model, parallel, rank=0)
    assert (found.weights, found.gradients, found.optimizer) == (4 * elements, 4 * elements, 8 * elements)


@pytest.mark.usefixtures("_no_group")
def test_the_last_rank_holds_no_more():
    model, (replicate, fsdp, tp, ep) = LAYOUTS["fsdp8"]
    parallel = ParallelConfig(replicate=replicate, fsdp=fsdp, tp=tp, ep=ep)
    assert 4 * local_elements(model, parallel, rank=7) <= memory(planned(model, parallel)).weights


@pytest.mark.usefixtures("_no_group")
@pytest.mark.parametrize(
    "wrong",
    [{"tp": 1, "dp": 8}, {"edp": 4}, {"replicate": 2}, {"engine": "megatron"}],
    ids=["TP forgotten", "twice the expert shards", "HSDP instead of FSDP", "ZeRO-1 instead of FSDP2"],
)
def test_a_wrong_layout_is_noticed(wrong):
    model, (replicate, fsdp, tp, ep) = LAYOUTS["fsdp4 tp2 ep4"]
    parallel = ParallelConfig(replicate=replicate, fsdp=fsdp, tp=tp, ep=ep)
    step = planned(model, parallel)
    mutant = replace(step, layout=replace(step.layout, **wrong))
    elements = local_elements(model, parallel, rank=0)
    assert memory(step).weights == 4 * elements != memory(mutant).weights
