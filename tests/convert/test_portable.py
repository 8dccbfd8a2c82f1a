"""What `portable=true` writes changes nothing in transformers, and is what other engines must find."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import conversions
import models
import pytest
import torch
from conversions import options
from transformers import AutoConfig

from upcycle.arch.targets import TARGETS
from upcycle.models.moe import describe_moe

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# Of qwen2_moe: without and with biases, shared experts, dense layers, windows, a tied head.
CASES = {
    "llama": {},
    "llama shared": {"shared_experts": 1},
    "llama_tied": {"layers": "every_2"},
    "qwen2": {},
    "qwen2 shared": {"shared_experts": 2, "router_order": "topk_softmax"},
    "qwen2_windows": {"shared_experts": 1},
    "phi3": {},
}
ZEROS = ("q_proj.bias", "k_proj.bias", "v_proj.bias", "shared_expert.{}_proj.weight")


def both(source: Path, tmp_path: Path, **asked: object) -> list[conversions.Converted]:
    made = []
    for portable in (True, False):
        output = tmp_path / f"portable {portable}"
        made.append(conversions.run(options(source, output, target="qwen2_moe", portable=portable, **asked)))
    return made


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_nothing_changes_in_transformers(case: str, dtype: str, dense: Callable[[str], Path], tmp_path: Path) -> None:
    """Bit for bit, in float32 too."""
    with_zeros, without = both(dense(case.split()[0]), tmp_path, dtype=dtype, **CASES[case])
    ids = models.token_ids()
    with torch.inference_mode():
        assert conversions.load(with_zeros.directory)(ids).logits.equal(conversions.load(without.directory)(ids).logits)
    assert describe_moe(with_zeros.directory) == describe_moe(without.directory)


@pytest.mark.parametrize("case", CASES)
def test_what_it_adds(case: str, dense: Callable[[str], Path], tmp_path: Path) -> None:
    with_zeros, without = both(dense(case.split()[0]), tmp_path, **CASES[case])
    more, fewer = (conversions.read_tensors(done.directory) for done in (with_zeros, without))
    added = {name for name in more if name not in fewer or not fewer[name].numel()}
    config = AutoConfig.from_pretrained(with_zeros.directory)
    assert config.qkv_bias
    assert config.shared_expert_intermediate_size >= 12
    biases = {name for name in added if name.endswith("_proj.bias")}
    assert len(biases) == (0 if case.startswith("qwen2") else 3 * models.LAYERS)
    assert all(not more[name].any() for name in added - {"lm_head.weight"})
    shared = {name for name in added if ".shared_expert." in name}
    assert all(32 in more[name].shape for name in shared)
    asked = CASES[case]
    assert len(shared) == (0 if asked.get("shared_experts") else 3 * len(with_zeros.plan.moe.layers))
    assert ("lm_head.weight" in added) == config.tie_word_embeddings
    if config.tie_word_embeddings:
        assert more["lm_head.weight"].equal(more["model.embed_tokens.weight"])
    gates = [tensor for name, tensor in more.items() if name.endswith("shared_expert_gate.weight")]
    assert all((gate == 2.0**-60).all() for gate in gates)
    assert added == biases | shared | ({"lm_head.weight"} & added)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "granitemoeshared", "olmoe", "flex_olmo", "upcycled_moe"])
def test_other_types_need_nothing(name: str) -> None:
    assert TARGETS[name].padding is None


def test_a_gate_of_zeros_would_be_noticed(dense: Callable[[str], Path], tmp_path: Path) -> None:
    """As llama.cpp computes it: silu(s)/s is 1/2 for the gate that is written, and NaN for one of zeros."""
    written = conversions.run(options(dense("llama"), tmp_path / "moe", shared_experts=1, dtype="bfloat16"))
    gate = conversions.read_tensors(written.directory)["model.layers.0.mlp.shared_expert_gate.weight"]
    assert gate.dtype == torch.bfloat16
    score = gate.float() @ torch.linspace(-3, 4, models.HIDDEN)
    assert (torch.nn.functional.silu(score) / score).equal(torch.tensor([0.5]))
    zero = torch.zeros(1)
    assert (torch.nn.functional.silu(zero) / zero).isnan()


def test_float16_has_no_number_so_small(dense: Callable[[str], Path], tmp_path: Path) -> None:
    written = conversions.run(options(dense("llama"), tmp_path / "moe", shared_experts=1, dtype="float16"))
    tensors = conversions.read_tensors(written.directory)
    kinds = {name.split(".")[-2]: tensor.dtype for name, tensor in tensors.items()}
    assert {name for name, dtype in kinds.items() if dtype == torch.float32} == {"shared_expert_gate"}
    assert (tensors["model.layers.0.mlp.shared_expert_gate.weight"] == 2.0**-60).all()
    assert AutoConfig.from_pretrained(written.directory).dtype == torch.float16


def test_the_card_says_what_is_for_others(dense: Callable[[str], Path], tmp_path: Path) -> None:
    with_zeros, without = both(dense("llama"), tmp_path)
    card, plain = ((done.directory / "README.md").read_text() for done in (with_zeros, without))
    cost = json.loads((with_zeros.directory / "upcycle_manifest.json").read_text())["cost"]
    assert f"| for other engines, besides | {cost['padding_parameters']:,} zeros," in card
    assert "besides" not in plain
    assert all(f"- {line}" in card for line in ("vLLM: served exactly", "llama.cpp: served exactly"))
    assert "- vLLM: does not load it: it takes no shared expert of width 0: set portable=true" in plain
