"""What lies beside a source's weights goes through training and export: tokenizer, stop tokens, licences."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import conversions
import gguf_files
import llama2_tokenizer
import models
import pytest
import torch
import training
from gguf import GGMLQuantizationType, GGUFWriter
from llama2_tokenizer import TEXT, VOCAB
from transformers import AutoModelForCausalLM, AutoTokenizer

from upcycle.data.bytes_tokenizer import byte_tokenizer
from upcycle.models.auxiliary import auxiliary_files
from upcycle.train.config import ExportConfig
from upcycle.train.export import export

if TYPE_CHECKING:
    from pathlib import Path

pytest_plugins = ("text_model",)

EXACT = (*training.SMALL_MOE, "moe.router_order=topk_softmax", "balance.aux_loss=0")
ARMS = {
    "dense": ["model=dense"],
    "upcycle": ["model=upcycle", *EXACT],
    "generic": ["model=upcycle", *EXACT, "target=upcycled_moe"],
    "checkpoint": ["model=checkpoint"],
    "dense checkpoint": ["model=checkpoint"],
    "scratch": ["model=scratch", *EXACT],
}
STILL = ("budget.steps=1", "schedule=constant", "schedule.peak=1e-12", "optim.weight_decay=0", "data.held_out=0")
PROMPT = torch.tensor([[40, 41, 42, 43]])


def exported(text: Path, place: Path, source: Path, *changes: str) -> Path:
    """One step at a learning rate that changes nothing, exported."""
    training.run(training.options(text, place / "run", f"source='{source}'", *STILL, *changes))
    asked = ExportConfig(
        run=str(place / "run"), output=str(place / "out"), checkpoint="last", dtype="float32", overwrite=False
    )
    return export(asked)


def generated(directory: Path) -> list[int]:
    """What a user's greedy generation gives, which ends where the checkpoint says."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, experts_implementation="eager")
    made = model.generate(PROMPT, max_new_tokens=24, do_sample=False, pad_token_id=0)
    return [int(each) for each in made[0]]


def first_new(ids: list[int]) -> int:
    """A token of a continuation that was not generated before, some way in."""
    continuation = ids[PROMPT.shape[1] :]
    return next(each for place, each in enumerate(continuation) if place >= 3 and each not in continuation[:place])


@pytest.fixture(scope="module")
def complete(text_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The text model with all that a Hub repository has; generation stops at a second token, on the way."""
    directory = shutil.copytree(text_model, tmp_path_factory.mktemp("complete") / "llama")
    stop = first_new(generated(directory))
    content = {"eos_token_id": [2, stop], "bos_token_id": 1, "temperature": 0.6, "do_sample": True, "top_p": 0.9}
    (directory / "generation_config.json").write_text(json.dumps(content))
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    for name in ("LICENSE", "NOTICE.txt", "USE_POLICY.md", "tekken.json"):
        (directory / name).write_text(name)
    return directory


@pytest.mark.parametrize("arm", ARMS)
def test_an_export_has_it_byte_for_byte(text: Path, complete: Path, tmp_path: Path, arm: str) -> None:
    source = complete
    if arm == "checkpoint":
        changes = {"target": "qwen2_moe", "router_order": "topk_softmax"}
        source = conversions.run(conversions.options(complete, tmp_path / "moe", **changes)).directory
    output = exported(text, tmp_path, source, *ARMS[arm])
    for file in auxiliary_files(complete):
        name = file.relative_to(complete)
        assert (output / name).read_bytes() == file.read_bytes(), name
    ids = generated(complete)
    stops = json.loads((complete / "generation_config.json").read_text())["eos_token_id"]
    assert len(ids) < PROMPT.shape[1] + 24
    assert ids[-1] == stops[1]
    if arm != "scratch":
        assert generated(output) == ids
    (output / "generation_config.json").unlink()
    assert arm == "scratch" or len(generated(output)) > len(ids), "the mutant: config.json's end of text alone"


def test_a_source_that_says_nothing_of_generation(text: Path, text_model: Path, tmp_path: Path) -> None:
    """Then config.json does, in the source as in the output."""
    source = shutil.copytree(text_model, tmp_path / "source")
    (source / "generation_config.json").unlink()
    output = exported(text, tmp_path, source, "model=dense")
    assert not (output / "generation_config.json").exists()
    assert generated(output) == generated(source)


@pytest.mark.parametrize("arm", ["dense", "upcycle"])
def test_of_a_gguf_file(text: Path, tmp_path: Path, arm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write, stop = GGUFWriter.add_name, 0

    def and_the_end_of_a_turn(self: GGUFWriter, name: str) -> None:
        write(self, name)
        if stop:
            self.add_eot_token_id(stop)

    monkeypatch.setattr(GGUFWriter, "add_name", and_the_end_of_a_turn)
    tokens = ["<|endoftext|>", *gguf_files.vocabulary()[1:]]  # transformers adds that one where it is not
    monkeypatch.setattr(gguf_files, "vocabulary", lambda: tokens)
    plain = gguf_files.write_gguf(tmp_path / "plain.gguf", [GGMLQuantizationType.F32])
    options = {"router_order": "topk_softmax"}
    whole = generated(conversions.run(conversions.options(plain, tmp_path / "plain", **options)).directory)
    stop = first_new(whole)
    source = gguf_files.write_gguf(tmp_path / "tiny.gguf", [GGMLQuantizationType.F32])
    output = exported(text, tmp_path, source, *ARMS[arm])
    assert generated(output) == whole[: whole.index(stop, PROMPT.shape[1]) + 1]
    before, after = (
        AutoTokenizer.from_pretrained(tmp_path, gguf_file=source.name),
        AutoTokenizer.from_pretrained(output),
    )
    assert after(TEXT)["input_ids"] == before(TEXT)["input_ids"]
    assert after.chat_template == before.chat_template == gguf_files.TEMPLATE


def test_the_tokenizer_keeps_its_class(text: Path, tmp_path: Path) -> None:
    """Training reads what the source's tokenizer reads, and so does a user of the export."""
    source = models.save(models.build("llama", vocab_size=VOCAB), tmp_path / "source")
    llama2_tokenizer.write_tokenizer(source)
    (source / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    output = exported(text, tmp_path, source, *ARMS["upcycle"], "target=qwen2_moe")
    config = json.loads((output / "tokenizer_config.json").read_text())
    assert config == {"eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    before, after = (AutoTokenizer.from_pretrained(directory) for directory in (source, output))
    ids = before(TEXT)["input_ids"]
    assert after(TEXT)["input_ids"] == ids
    assert after.decode(ids) == before.decode(ids) == TEXT


def test_another_tokenizer_takes_the_place_of_the_sources(text: Path, complete: Path, tmp_path: Path) -> None:
    output = exported(text, tmp_path, complete, *ARMS["upcycle"], "tokenizer=bytes")
    assert AutoTokenizer.from_pretrained(output)("é")["input_ids"] == byte_tokenizer()("é")["input_ids"]
    assert not (output / "tekken.json").exists()
    assert not (output / "additional_chat_templates").exists()
    for name in ("LICENSE", "generation_config.json"):
        assert (output / name).read_bytes() == (complete / name).read_bytes()


def test_a_model_of_its_own_has_the_tokenizer_alone(text: Path, complete: Path, tmp_path: Path) -> None:
    small = "{model_type: llama, hidden_size: 32, intermediate_size: 24, num_hidden_layers: 1, num_attention_heads: 4}"
    output = exported(text, tmp_path, complete, "model=scratch", f"architecture={small}")
    before, after = (AutoTokenizer.from_pretrained(directory) for directory in (complete, output))
    assert after(TEXT)["input_ids"] == before(TEXT)["input_ids"]
    assert not (output / "LICENSE").exists()
    assert not (output / "generation_config.json").exists()


def test_a_resumed_run_has_no_more_than_the_source(text: Path, complete: Path, tmp_path: Path) -> None:
    exported(text, tmp_path, complete, "model=dense")
    (tmp_path / "run" / "model" / "vocab.json").write_text("of an earlier version")
    (tmp_path / "run" / "model" / "LICENSE").unlink()
    again = [f"source='{complete}'", *STILL, "model=dense", "resume=auto"]
    training.run(training.options(text, tmp_path / "run", *again))
    found = {file.relative_to(tmp_path / "run/model") for file in auxiliary_files(tmp_path / "run/model")}
    assert found == {file.relative_to(complete) for file in auxiliary_files(complete)}
