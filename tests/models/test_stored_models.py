"""Dense models as people store them: heads that are tied in name alone, one of a tied pair, wrappers, stray tensors."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING

import conversions
import models
import pytest
import torch
import training
from conversions import TOLERANCE, options
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from upcycle.errors import OutputError, SourceError
from upcycle.models.source import open_source
from upcycle.train.config import ExportConfig
from upcycle.train.export import export

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

pytest_plugins = ("text_model",)

HEAD = "lm_head.weight"
LAYOUTS = ("one file", "shards", "bin")


def stored(directory: Path, name: str, layout: str = "one file") -> Path:
    """A model whose head is its own, and whose config.json says that it is tied."""
    model = models.build(name, tie_word_embeddings=False)
    models.save(model, directory, max_shard_size="20KB" if layout == "shards" else "5GB")
    if layout == "bin":
        state = load_file(directory / "model.safetensors")
        (directory / "model.safetensors").unlink()
        torch.save(state, directory / "pytorch_model.bin")
    say(directory, tie_word_embeddings=True)
    return directory


def say(directory: Path, **fields: object) -> None:
    """Change fields of config.json."""
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def logits(directory: Path) -> Tensor:
    """What plain transformers computes, whatever it thinks of the files."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, experts_implementation="eager").eval()
    with torch.no_grad():
        return model(models.token_ids()).logits  # type: ignore[no-any-return]


def with_tied_head(directory: Path) -> Tensor:
    """What is computed where the stored head is dropped on the word of the flag."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    model.set_output_embeddings(torch.nn.Linear(*model.lm_head.weight.shape[::-1], bias=False))
    model.lm_head.weight = model.get_input_embeddings().weight
    with torch.no_grad():
        return model(models.token_ids()).logits  # type: ignore[no-any-return]


def request(directory: Path) -> ExportConfig:
    """To export the run in a directory."""
    run, output = str(directory / "run"), str(directory / "exported")
    return ExportConfig(run=run, output=output, checkpoint="last", dtype="float32", overwrite=False)


@pytest.mark.parametrize("order", conversions.ROUTER_ORDERS)
@pytest.mark.parametrize("name", models.ONE_PER_FAMILY)
def test_a_head_that_is_tied_in_name_alone(
    name: str, order: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is converted, in every family; a conversion that drops it is far away."""
    source = stored(tmp_path / "dense", name, "shards" if name in models.SHARDED else "one file")
    with caplog.at_level(logging.WARNING, "upcycle"):
        converted = conversions.run(options(source, tmp_path / "moe", router_order=order))
    assert "config.json ties the head to the embedding" in caplog.text
    assert "what is written says tie_word_embeddings=false" in caplog.text
    assert HEAD not in converted.plan.dropped
    expected = logits(source)
    assert difference(logits(converted.directory), expected) < TOLERANCE[order]
    assert difference(with_tied_head(source), expected) > 0.1
    assert AutoConfig.from_pretrained(converted.directory).get_text_config().tie_word_embeddings is False


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_head_that_is_tied_in_name_alone_in_every_layout(layout: str, tmp_path: Path) -> None:
    source = stored(tmp_path / "dense", "llama", layout)
    converted = conversions.run(options(source, tmp_path / "moe", router_order="topk_softmax"))
    assert difference(logits(converted.directory), logits(source)) < TOLERANCE["topk_softmax"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_that_equals_the_embedding_stays_tied(dtype: torch.dtype, tmp_path: Path) -> None:
    """Also where it is stored in another type, which says the same numbers."""
    source = models.save(models.build("qwen2"), tmp_path / "dense", dtype=torch.bfloat16)
    state = load_file(source / "model.safetensors")
    state[HEAD] = state["model.embed_tokens.weight"].to(dtype, copy=True)
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    opened = open_source(str(source))
    assert opened.model.tied
    assert opened.dropped == {HEAD: "tied to the embedding"}


@pytest.mark.parametrize("layout", ["one file", "bin"])
@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "qwen2"])
def test_a_tied_pair_of_which_the_head_is_stored(name: str, layout: str, tmp_path: Path) -> None:
    source = models.save(models.build(name), tmp_path / "dense")
    expected = logits(source)
    embedding = open_source(str(source)).model.family.embedding
    state = load_file(source / "model.safetensors")
    state[HEAD] = state.pop(next(key for key in state if embedding.endswith(key)))
    (source / "model.safetensors").unlink()
    if layout == "bin":
        torch.save(state, source / "pytorch_model.bin")
    else:
        save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    assert difference(logits(source), expected) == 0
    converted = conversions.run(options(source, tmp_path / "moe", router_order="topk_softmax"))
    assert difference(logits(converted.directory), expected) < TOLERANCE["topk_softmax"]


@pytest.mark.parametrize("arm", ["dense", "upcycle", "checkpoint"])
def test_a_head_that_is_tied_in_name_alone_is_trained_and_exported(
    arm: str, text: Path, text_model: Path, tmp_path: Path
) -> None:
    """One step too small to be seen: what export writes computes what the source does."""
    source = tmp_path / "dense"
    AutoModelForCausalLM.from_pretrained(text_model).save_pretrained(source)
    AutoTokenizer.from_pretrained(text_model).save_pretrained(source)
    say(source, tie_word_embeddings=True)
    expected, given = logits(source), source
    if arm == "checkpoint":
        given = conversions.run(options(source, tmp_path / "moe", router_order="topk_softmax")).directory
        say(given, tie_word_embeddings=True)  # as a converter writes it that believes the flag
    shape = () if arm != "upcycle" else ("moe.router_order=topk_softmax", *training.SMALL_MOE)
    run = training.run(
        training.options(
            text,
            tmp_path / "run",
            f"model={arm}",
            f"source='{given}'",
            *shape,
            "budget.steps=1",
            "schedule.peak=1e-9",
            "schedule.final=0",
        )
    )
    assert run.module.model.lm_head.weight is not run.module.model.get_input_embeddings().weight
    assert difference(logits(export(request(tmp_path))), expected) < 1e-4


def test_an_export_that_does_not_load_as_what_was_trained(text: Path, text_model: Path, tmp_path: Path) -> None:
    """The run's checkpoint is what counts: here its config ties a head that training left apart."""
    training.run(training.options(text, tmp_path / "run", "model=dense", f"source='{text_model}'", "budget.steps=1"))
    file = tmp_path / "run/checkpoints/last.ckpt"
    content = torch.load(file, weights_only=False)
    name = next(key for key in content["state_dict"] if key.endswith("embed_tokens.weight"))
    say(tmp_path / "run/model", tie_word_embeddings=True)
    content["state_dict"]["model." + HEAD] = content["state_dict"][name] + 1
    torch.save(content, file)
    with pytest.raises(OutputError, match="does not load as what was trained"):
        export(request(tmp_path))
    assert not (tmp_path / "exported").exists()


@pytest.mark.parametrize(
    ("prefix", "remedy"),
    [
        ("module.", "model.module.save_pretrained"),
        ("_orig_mod.", "model._orig_mod.save_pretrained"),
        ("module._orig_mod.", "save_pretrained"),
        ("base_model.model.", "merge_and_unload"),
        ("model.", "its own save_pretrained"),
        ("student.", "its own save_pretrained"),
    ],
)
def test_a_model_inside_a_wrapper(prefix: str, remedy: str, tmp_path: Path) -> None:
    source = models.save(models.build("llama"), tmp_path / "dense")
    state = {prefix + name: value for name, value in load_file(source / "model.safetensors").items()}
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match=f"begins with '{prefix}'.*inside a wrapper") as raised:
        open_source(str(source))
    assert remedy in str(raised.value)


def test_unlisted_tensors_that_no_model_has_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As transformers does. A listed one is refused."""
    source = models.save(models.build("llama"), tmp_path / "dense", max_shard_size="20KB")
    shard = next(source.glob("*.safetensors"))
    stray, buffer = "model.layers.0.mlp.extra.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file(load_file(shard) | {stray: torch.ones(2), buffer: torch.ones(2)}, shard, metadata={"format": "pt"})
    opened = open_source(str(source))
    assert stray in caplog.text
    assert buffer not in caplog.text
    assert set(opened.dropped) == {stray, buffer}
    index = source / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][stray] = shard.name
    index.write_text(json.dumps(content))
    with pytest.raises(SourceError, match=f"does not have\n.*{stray}"):
        open_source(str(source))


def test_the_language_model_of_a_model_of_several_kinds_of_input(tmp_path: Path) -> None:
    """What the remedy says, done."""
    inner = json.loads(models.config("gemma3").to_json_string())
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    whole = AutoModelForImageTextToText.from_config(
        AutoConfig.for_model(
            "gemma3",
            text_config=inner,
            vision_config={**vision, "image_size": 28, "patch_size": 14},
            mm_tokens_per_image=1,
            image_token_index=5,
        )
    )
    whole.save_pretrained(tmp_path / "whole")
    with pytest.raises(SourceError, match="several kinds of input\n.*gemma3 around .*gemma3_text") as raised:
        open_source(str(tmp_path / "whole"))
    assert "AutoModelForCausalLM.from_config(whole.config.text_config)" in str(raised.value)
    text = AutoModelForCausalLM.from_config(whole.config.text_config)
    text.model, text.lm_head = whole.model.language_model, whole.lm_head
    text.save_pretrained(tmp_path / "text")
    assert open_source(str(tmp_path / "text")).model.family.model_type == "gemma3_text"
