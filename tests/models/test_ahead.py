"""The block that predicts tokens after the next one: published names, its arithmetic, and where it starts from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import models
import pytest
import torch
from conversions import described
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from upcycle.errors import ConfigError
from upcycle.models.ahead import AheadBlock, stored_tensors

if TYPE_CHECKING:
    from pathlib import Path

MIXTURE = {
    "hybrid_override_pattern": "ME*E",
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "moe_shared_expert_intermediate_size": 16,
}
AHEAD = {"num_nextn_predict_layers": 1}


def config(pattern: str, **changes: Any) -> Any:
    return models.config("nemotron_h", **MIXTURE, **AHEAD, mtp_hybrid_override_pattern=pattern, **changes)


def stored(block: AheadBlock) -> dict[str, Tensor]:
    """The block's tensors as published checkpoints have them: experts one by one."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in block.layers.state_dict(prefix="mtp.layers.").items():
        stem, _, matrix = name.rpartition(".")
        if stem.endswith("experts"):
            tensors |= {f"{stem}.{expert}.{matrix}.weight": each for expert, each in enumerate(tensor)}
        else:
            tensors[name] = tensor
    return tensors


@pytest.mark.parametrize("pattern", ["*E", "*-", "E", "ME"])
def test_its_names_and_shapes_are_those_of_the_plan(pattern: str) -> None:
    found = {name: tuple(tensor.shape) for name, tensor in stored(AheadBlock(config(pattern))).items()}
    changes = {**MIXTURE, **AHEAD, "mtp_hybrid_override_pattern": pattern}
    assert found == described("nemotron_h", **changes).ahead_shapes()


def test_it_takes_over_what_is_stored() -> None:
    torch.manual_seed(1)
    one, other = AheadBlock(config("*E")), AheadBlock(config("*E"))
    assert not torch.equal(one.layers[1].mixer.experts.up_proj, other.layers[1].mixer.experts.up_proj)
    other.fill(stored(one))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_its_arithmetic() -> None:
    """Both inputs normed, embedding first; then the layers with their residuals, and a norm."""
    block = AheadBlock(config("*-")).eval()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        hidden, embedded = torch.randn(2, 2, 5, models.HIDDEN)
        attention, ffn = block.layers
        both = torch.cat([attention.enorm(embedded), attention.hnorm(hidden)], dim=-1)
        x = both @ attention.eh_proj.weight.T
        mask = torch.full((5, 5), float("-inf")).triu(1)[None, None]
        x = x + attention.mixer(attention.norm(x), attention_mask=mask)[0]
        x = x + (ffn.norm(x) @ ffn.mixer.up_proj.weight.T).relu().square() @ ffn.mixer.down_proj.weight.T
        torch.testing.assert_close(block(hidden, embedded), ffn.final_layernorm(x))
        swapped = block(embedded, hidden)
    assert not torch.allclose(swapped, ffn.final_layernorm(x), atol=0.1)


def test_a_models_tensors_by_their_names_on_disk(tmp_path: Path) -> None:
    made = models.config("nemotron_h", **MIXTURE)
    model = AutoModelForCausalLM.from_config(made, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    read, stored = stored_tensors(model), load_file(tmp_path / "model.safetensors")
    assert "backbone.layers.3.mixer.experts.2.down_proj.weight" in stored
    assert all(torch.equal(read(name), tensor) for name, tensor in stored.items())


def test_a_type_without_such_layers() -> None:
    with pytest.raises(ConfigError, match="no layers for multi-token prediction"):
        AheadBlock(models.config("llama"))
