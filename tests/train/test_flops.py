"""FLOPs from shapes against torch's counter, and against what the conversion's plan says."""

from __future__ import annotations

from typing import TYPE_CHECKING

import conversions
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from upcycle.convert.prepare import prepare
from upcycle.models.load import load_checkpoint
from upcycle.models.moe import describe_moe
from upcycle.train.flops import forward_flops

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from transformers import PreTrainedModel

L = 16


def counted(model: PreTrainedModel) -> int:
    """Forward FLOPs of a sequence by torch's counter, which sees every product of matrices (but not CPU's SDPA)."""
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.arange(L)[None] % 60, use_cache=False)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gemma2", "phi3", "nemotron"])
def test_dense(dense: Callable[[str], Path], name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(dense(name)).eval()
    expected = forward_flops(model, None, sequence_length=L) * L
    assert counted(model) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("target", ["mixtral", "qwen2_moe", "upcycled_moe"])
def test_moe_against_the_counter_and_the_plan(dense: Callable[[str], Path], tmp_path: Path, target: str) -> None:
    order = "topk_softmax" if target == "mixtral" else "softmax_topk"
    request = conversions.options(dense("llama"), tmp_path / "moe", target=target, router_order=order, portable=False)
    done = conversions.run(request)
    model = load_checkpoint(done.directory)
    moe = describe_moe(done.directory)
    per_token = forward_flops(model, moe, sequence_length=L)
    # torch's counter sees the loop over experts: as many products as tokens visit.
    assert counted(model) == pytest.approx(per_token * L, rel=0.01)
    without_attention = forward_flops(model, moe, sequence_length=0)
    assert without_attention == prepare(request, execute=False).cost.flops_per_token


def test_a_wrong_share_of_experts_is_noticed(dense: Callable[[str], Path], tmp_path: Path) -> None:
    """The mutant: counting all experts."""
    done = conversions.run(conversions.options(dense("llama"), tmp_path / "moe", target="qwen2_moe"))
    model, moe = load_checkpoint(done.directory), describe_moe(done.directory)
    object.__setattr__(moe, "top_k", moe.experts)
    assert forward_flops(model, moe, sequence_length=L) * L > 1.1 * counted(model)
