"""Zeros for other engines are not trained: a checkpoint is read without them, and written with them again."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import conversions
import models
import pytest
import torch
import training
from models import token_ids
from transformers import AutoModelForCausalLM, AutoTokenizer

from upcycle.errors import SourceError
from upcycle.models.moe import describe_moe
from upcycle.train.config import ExportConfig
from upcycle.train.export import export
from upcycle.train.models import start_model
from upcycle.train.optim import parameter_groups

if TYPE_CHECKING:
    from pathlib import Path

    from upcycle.train.start import Start

pytest_plugins = ("text_model",)

Q_BIAS = "model.layers.0.self_attn.q_proj.bias"


@pytest.fixture(scope="module")
def tied(text_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model that knows text, with a tied head."""
    directory = models.save(
        models.build("llama", vocab_size=300, tie_word_embeddings=True), tmp_path_factory.mktemp("tied") / "llama"
    )
    AutoTokenizer.from_pretrained(text_model).save_pretrained(directory)
    return directory


def trained_parameters(start: Start, text: Path) -> dict[str, list[tuple[int, ...]]]:
    optim = training.options(text, text, "model=dense", "source=x").optim
    groups = parameter_groups(start.model, start.moe, optim, peak=1.0)
    return {group["name"]: [tuple(each.shape) for each in group["params"]] for group in groups}


@pytest.mark.parametrize("shared", [0, 1])
def test_a_portable_checkpoint_is_read_as_what_it_is(text: Path, tied: Path, tmp_path: Path, shared: int) -> None:
    """The same parameters are trained from the same values as with model=upcycle, and cost the same."""
    asked = {"expansion": 2, "shared_experts": shared, "router_std": 0.01, "target": "qwen2_moe", "dtype": "float32"}
    done = conversions.run(conversions.options(tied, tmp_path / "moe", **asked))
    assert {"zeros", "copy"} <= {tensor.kind for tensor in done.plan.tensors}
    given = (f"source='{tied}'", *training.SMALL_MOE, f"moe.shared_experts={shared}", "init.router_std=0.01")
    arms = (("model=upcycle", *given, "target=qwen2_moe"), ("model=checkpoint", f"source='{done.directory}'"))
    upcycled, loaded = (start_model(training.options(text, tmp_path / "run", *arm)) for arm in arms)
    assert trained_parameters(upcycled, text) == trained_parameters(loaded, text)
    differing = training.differing_tensors(upcycled.model.state_dict(), loaded.model.state_dict())
    assert [name for name in differing if "shared_expert_gate" not in name] == []
    assert upcycled.moe == loaded.moe
    assert loaded.moe is not None
    assert loaded.moe.name == ("E2G2T2S1" if shared else "E2G2T2")
    assert not loaded.model.config.qkv_bias
    head = loaded.model.get_output_embeddings().weight
    assert head is loaded.model.get_input_embeddings().weight


def test_an_export_has_the_zeros_again(text: Path, tied: Path, tmp_path: Path) -> None:
    """And computes what was trained, bit for bit; it goes on as what it is."""
    made = ("model=upcycle", f"source='{tied}'", *training.SMALL_MOE)
    training.run(training.options(text, tmp_path / "run", *made))
    written = {}
    for portable in (True, False):
        asked = {"run": str(tmp_path / "run"), "output": str(tmp_path / f"{portable}"), "checkpoint": "last"}
        written[portable] = export(ExportConfig(**asked, dtype="float32", overwrite=False, portable=portable))
    more, fewer = (conversions.read_tensors(written[portable]) for portable in (True, False))
    added = {name for name in more if name not in fewer or not fewer[name].numel()}
    assert {name.split(".")[-2] for name in added} == {
        *("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
    }
    assert not any(more[name].any() for name in added - {"lm_head.weight"})
    assert more["lm_head.weight"].equal(more["model.embed_tokens.weight"])
    assert all(more[name].any() for name in more if "shared_expert_gate" in name)
    loaded = [AutoModelForCausalLM.from_pretrained(directory).eval() for directory in written.values()]
    with torch.inference_mode():
        assert loaded[0](token_ids()).logits.equal(loaded[1](token_ids()).logits)
    assert all(model.config.tie_word_embeddings for model in loaded)
    zeros = loaded[0].num_parameters() - loaded[1].num_parameters()
    cards = [(directory / "README.md").read_text() for directory in written.values()]
    assert f"| parameters | {loaded[1].num_parameters():,}, and {zeros:,} zeros for other engines |" in cards[0]
    assert f"| parameters | {loaded[1].num_parameters():,} |" in cards[1]
    assert "- vLLM: served exactly" in cards[0]
    assert "- vLLM: does not load it" in cards[1]

    again = ("model=checkpoint", f"source='{written[True]}'", "budget.steps=2")
    run = training.run(training.options(text, tmp_path / "again", *again))
    assert describe_moe(written[True]).shared_width == 0
    assert Q_BIAS not in run.module.model.state_dict()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_export_in_half_precision(text: Path, tied: Path, tmp_path: Path, dtype: str) -> None:
    made = ("model=upcycle", f"source='{tied}'", *training.SMALL_MOE, "budget.steps=1")
    training.run(training.options(text, tmp_path / "run", *made))
    asked = {"run": str(tmp_path / "run"), "output": str(tmp_path / "out"), "checkpoint": "last"}
    tensors = conversions.read_tensors(export(ExportConfig(**asked, dtype=dtype, overwrite=False)))
    assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, dtype)}
    assert all(tensor.all() for name, tensor in tensors.items() if "shared_expert_gate" in name)


def test_zeros_that_something_else_trained_are_refused(text: Path, text_moe: Path, tmp_path: Path) -> None:
    """Leaving them out would lose them; as the error says, they may be the model's own."""
    directory = tmp_path / "moe"
    model = AutoModelForCausalLM.from_pretrained(text_moe)
    with torch.no_grad():
        model.get_parameter(Q_BIAS).fill_(0.5)
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(text_moe).save_pretrained(directory)
    options = training.options(text, tmp_path / "run", "model=checkpoint", f"source='{directory}'")
    with pytest.raises(SourceError, match=rf"{Q_BIAS}(.|\n)*delete upcycle_padding from config.json"):
        start_model(options)
    config = json.loads((directory / "config.json").read_text())
    del config["upcycle_padding"]
    (directory / "config.json").write_text(json.dumps(config))
    assert (start_model(options).model.get_parameter(Q_BIAS) == 0.5).all()
