"""Training hybrids of Mamba-2, attention and FFNs: all arms, exact resume, export in the family's own words."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import conversions
import models
import pytest
import torch
import training
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from upcycle.arch.mixing import SCAN, cache_bytes, mixers, mixing_flops
from upcycle.routing.balance import bias_step
from upcycle.train.config import ExportConfig
from upcycle.train.export import export
from upcycle.train.flops import forward_flops

if TYPE_CHECKING:
    from pathlib import Path

pytest_plugins = ("text_model",)
BYTES = 300  # rows of the embedding: all bytes, and the special tokens
BALANCED = ("balance.bias_update=1e-2", "moe.expansion=4", "moe.granularity=2", "moe.top_k=4")
MIXTURE = (
    "{model_type: nemotron_h, hidden_size: 32, hybrid_override_pattern: ME*E, num_attention_heads: 2, head_dim: 16, "
    "num_key_value_heads: 1, mamba_num_heads: 2, mamba_head_dim: 16, n_groups: 1, ssm_state_size: 8, chunk_size: 16, "
    "intermediate_size: 64, n_routed_experts: 8, num_experts_per_tok: 2, moe_intermediate_size: 16, "
    "moe_shared_expert_intermediate_size: 32, moe_latent_size: 16, routed_scaling_factor: 2.5}"
)


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hybrid that reads bytes."""
    return models.save(models.build("nemotron_h", vocab_size=BYTES), tmp_path_factory.mktemp("hybrid"))


def given(hybrid: Path, arm: str) -> tuple[str, ...]:
    return (f"model={arm}", f"source='{hybrid}'", "tokenizer=bytes", *(BALANCED if arm != "dense" else ()))


@pytest.mark.parametrize("arm", ["dense", "upcycle", "scratch"])
def test_resumed_exactly_and_exported(arm: str, hybrid: Path, text: Path, tmp_path: Path) -> None:
    training.run(training.options(text, tmp_path / "whole", *given(hybrid, arm)))
    stopped = training.options(text, tmp_path / "stopped", *given(hybrid, arm), "resume=auto")
    with pytest.raises(RuntimeError, match="plug"):
        training.run(stopped, [training.At(4, training.fail)])
    training.run(stopped)
    one, other = (training.checkpoint(tmp_path / name)["state_dict"] for name in ("whole", "stopped"))
    assert training.differing_tensors(one, other) == []

    request = ExportConfig(
        run=str(tmp_path / "whole"), output=str(tmp_path / "out"), checkpoint="last", dtype="float32", overwrite=False
    )
    written = json.loads((export(request) / "config.json").read_text())
    assert written["hybrid_override_pattern"] == ("M-*-" if arm == "dense" else "ME*E")
    assert written["num_hidden_layers"] == 4
    assert "layers_block_type" not in written
    assert conversions.load(tmp_path / "out").config.num_hidden_layers == 4


@pytest.mark.parametrize("shared", ["null", "8", "all"])
def test_experts_start_as_shards_of_the_layer_that_is_named(
    shared: str, hybrid: Path, text: Path, tmp_path: Path
) -> None:
    """moe.layers counts layers with an FFN: 1 is the last one; and a part of its FFN may be the shared expert's."""
    arm = (*given(hybrid, "upcycle"), "moe.layers=[1]", f"moe.shared_neurons={shared}", "metrics=dense")
    training.run(training.options(text, tmp_path / "run", *arm))
    first = next(row for row in training.rows(tmp_path / "run") if "moe/dense_cosine" in row)
    cosines = first["moe/layer_3/dense_cosine"]
    assert len(cosines) == 8
    assert cosines == pytest.approx([0.5 if shared == "all" else 1.0] * 8, abs=1e-5)


def test_biases_move_by_group_while_groups_hold(hybrid: Path, text: Path, tmp_path: Path) -> None:
    moved = {}
    for per in ("group", "expert"):
        arm = (*given(hybrid, "upcycle"), f"balance.bias_per={per}")
        training.run(training.options(text, tmp_path / per, *arm))
        state = training.checkpoint(tmp_path / per)["state_dict"]
        biases = [value for name, value in state.items() if name.endswith("e_score_correction_bias")]
        assert len(biases) == 2
        moved[per] = torch.stack(biases)
        assert moved[per].any()
    grouped = moved["group"].unflatten(-1, (-1, 2))
    assert torch.equal(grouped[..., 0], grouped[..., 1])


def test_a_group_moves_as_one() -> None:
    loads = torch.tensor([[4, 0, 1, 1, 0, 6, 0, 0]])
    assert bias_step(loads).tolist() == [[-1, 1, 1, 1, 1, -1, 1, 1]]
    assert bias_step(loads, together=2).tolist() == [[-1, -1, 1, 1, -1, -1, 1, 1]]


def test_a_torn_bias_is_refused_with_tied_groups(hybrid: Path, text: Path, tmp_path: Path) -> None:
    request = conversions.options(hybrid, tmp_path / "moe", router_order="auto", expansion=4, top_k=4)
    conversions.run(request)
    file = tmp_path / "moe/model.safetensors"
    tensors = load_file(file)
    name = next(each for each in tensors if each.endswith("e_score_correction_bias"))
    tensors[name] = torch.linspace(-1, 1, 8)
    save_file(tensors, file, metadata={"format": "pt"})
    arm = ("model=checkpoint", f"source='{tmp_path / 'moe'}'", "tokenizer=bytes")
    with pytest.raises(Exception, match="correction bias that is equal within a virtual group"):
        training.run(training.options(text, tmp_path / "run", *arm))


def test_a_mixture_of_the_familys_own_from_scratch(text: Path, tmp_path: Path) -> None:
    arm = ("model=scratch", f"architecture={MIXTURE}", "tokenizer=bytes", "balance.bias_update=1e-2")
    run = training.run(training.options(text, tmp_path / "run", *arm))
    moe = run.start.moe
    assert moe is not None
    assert (moe.layers, moe.experts, moe.router_order, moe.scaling_factor) == ((1, 3), 8, "sigmoid_topk", 2.5)
    assert training.rows(tmp_path / "run")[-1]["val/loss"] > 0


def test_flops_of_layers_without_mamba_are_what_torch_counts() -> None:
    model = models.build("nemotron_h", hybrid_override_pattern="*-*-").eval()
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.arange(16)[None], use_cache=False)
    assert counter.get_total_flops() == pytest.approx(16 * forward_flops(model, None, sequence_length=16), rel=0.01)


def test_what_mixes_positions_is_counted_by_layer() -> None:
    config = models.config("nemotron_h_runs")  # MM*---
    assert mixers(config) == ("mamba2", "mamba2", "attention", None, None, None)
    convolved, channels, states = 4 * 8 + 2 * 2 * 8, 4 * 8, 8
    scan = 2 * convolved * 4 + SCAN * channels * states
    assert mixing_flops(config, sequence_length=16) == 4 * 16 * 4 * 8 + 2 * scan
    assert cache_bytes(config, element=2) == (2 * 2 * 8 * 2, 2 * (4 * channels * states + 2 * 4 * convolved))
