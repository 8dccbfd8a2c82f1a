"""Everything beside the weights goes along: tokenizer code, other vocabularies, policies; what does not is named."""

from __future__ import annotations

import json
import logging
import shutil
from typing import TYPE_CHECKING, Any

import conversions
import gguf_files
import models
import pytest
from gguf import GGMLQuantizationType, GGUFWriter
from huggingface_hub.utils import filter_repo_objects
from transformers import AutoTokenizer

from upcycle.errors import SourceError
from upcycle.models.auxiliary import auxiliary_files, left_behind
from upcycle.models.source import open_source

if TYPE_CHECKING:
    from pathlib import Path

CODE = """
from .words_my import WORD
from transformers import PreTrainedTokenizerFast

open(__file__ + ".ran", "w").close()

class MyTokenizer(PreTrainedTokenizerFast):
    def word(self):
        return WORD
"""
TAKEN = {
    "tekken.json": "{}",
    "qwen.tiktoken": "YQ== 0",
    "spiece.model": "bytes",
    "vocab.txt": "a",
    "USE_POLICY.md": "be good",
    "LICENSE.txt": "yours",
    "license": "too",
    "Notice": "this",
    "generation_config.json": '{ "eos_token_id": [2,\n5] }',
}
LEFT = {"trainer_state.json": "{}", "modeling_my.py": "1", "figure.png": "p"}
IGNORED = {"README.md": "#", ".gitattributes": "", "optimizer.pt": "", "training_args.bin": "", "model.onnx": ""}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A Llama whose tokenizer is Python code in two files, with much else around it."""
    directory = models.save(models.build("llama"), tmp_path / "source")
    models.tokenizer().save_pretrained(directory)
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    auto_map = {
        "AutoTokenizer": ["tokenization_my.MyTokenizer", None],
        "AutoProcessor": "elsewhere/repo--processing.P",
        "AutoConfig": "../outside.C",
    }
    settings = {**settings, "tokenizer_class": "MyTokenizer", "auto_map": auto_map}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "tokenization_my.py").write_text(CODE)
    (directory / "words_my.py").write_text('WORD = "carried"\n')
    (tmp_path / "outside.py").write_text("")
    for name, text in {**TAKEN, **LEFT, **IGNORED}.items():
        (directory / name).write_text(text)
    (directory / "original").mkdir()
    (directory / "original" / "params.json").write_text("{}")
    return directory


def test_what_goes_along(source: Path) -> None:
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "tokenization_my.py", "words_my.py"}
    assert {file.name for file in auxiliary_files(source)} == {*tokenizer, *TAKEN}
    assert left_behind(source) == ["figure.png", "modeling_my.py", "original/", "trainer_state.json"]


@pytest.mark.parametrize("target", ["qwen2_moe", "upcycled_moe"])
def test_the_output_has_it_byte_for_byte(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("tekken.json", "qwen.tiktoken", "spiece.model", "vocab.txt"):  # not what this tokenizer is made of
        (source / name).unlink()
    monkeypatch.setattr("builtins.input", lambda _prompt: pytest.fail("nobody is there to answer"))
    with caplog.at_level(logging.INFO, "upcycle"):
        output = conversions.run(conversions.options(source, tmp_path / "moe", target=target)).directory
    for file in auxiliary_files(source):
        assert (output / file.name).read_bytes() == file.read_bytes(), file.name
    said = [record.getMessage() for record in caplog.records if "left behind" in record.getMessage()]
    assert said == [f"left behind in {source}: figure.png, modeling_my.py, original/, trainer_state.json"]
    assert (
        "has code of its own (../outside.C, elsewhere/repo--processing.P, tokenization_my.MyTokenizer)" in caplog.text
    )
    assert "trust_remote_code=True transformers refuses it" in (output / "README.md").read_text()
    assert not list(tmp_path.rglob("*.ran"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    opened: Any = AutoTokenizer.from_pretrained(output, trust_remote_code=True)
    assert opened.word() == "carried"
    assert opened("class parse")["input_ids"] == models.tokenizer()("class parse")["input_ids"]


def test_from_the_hub(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the patterns for a Hub model fetch is enough for all of it."""
    (source / "adapter").mkdir()

    def download(_hub_id: str, allow_patterns: list[str]) -> str:
        names = [file.relative_to(source).as_posix() for file in source.rglob("*") if file.is_file()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns):
            (tmp_path / "snapshot" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / name, tmp_path / "snapshot" / name)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert open_source("somebody/model").path == tmp_path / "snapshot"
    names = [[file.name for file in auxiliary_files(directory)] for directory in (source, tmp_path / "snapshot")]
    assert names[0] == names[1]
    assert not (tmp_path / "snapshot" / "figure.png").exists()


def test_a_file_that_was_not_downloaded(source: Path, tmp_path: Path) -> None:
    (source / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n")
    with pytest.raises(SourceError, match="tokenizer.json was not downloaded"):
        conversions.run(conversions.options(source, tmp_path / "moe"))
    assert not (tmp_path / "moe").exists()


def test_nothing_is_said_where_nothing_is_left(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = models.save(models.build("llama"), tmp_path / "source")
    with caplog.at_level(logging.INFO, "upcycle"):
        conversions.run(conversions.options(source, tmp_path / "moe"))
    assert "left behind" not in caplog.text


def test_what_a_gguf_file_says_of_generation(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ends of a turn stop generation as the end of text does."""
    write = GGUFWriter.add_name

    def and_more(self: GGUFWriter, name: str) -> None:
        write(self, name)
        self.add_eot_token_id(7)
        self.add_uint32("tokenizer.ggml.eom_token_id", 9)
        self.add_float32("general.sampling.temp", 0.5)

    monkeypatch.setattr(GGUFWriter, "add_name", and_more)
    source = gguf_files.write_gguf(tmp_path / "tiny.gguf", [GGMLQuantizationType.F32])
    with caplog.at_level(logging.INFO, "upcycle"):
        output = conversions.run(conversions.options(source, tmp_path / "moe")).directory
    said = json.loads((output / "generation_config.json").read_text())
    assert said == {"bos_token_id": 0, "eos_token_id": [0, 7, 9]}
    assert conversions.load(output).generation_config.eos_token_id == [0, 7, 9]
    assert f"left behind in {source}: general.sampling.temp=0.5" in caplog.text


def test_a_gguf_file_that_says_no_more_than_its_config(tmp_path: Path) -> None:
    source = gguf_files.write_gguf(tmp_path / "tiny.gguf", [GGMLQuantizationType.F32])
    output = conversions.run(conversions.options(source, tmp_path / "moe")).directory
    assert not (output / "generation_config.json").exists()
    assert json.loads((output / "config.json").read_text())["eos_token_id"] == 0
