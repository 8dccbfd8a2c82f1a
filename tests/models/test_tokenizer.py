"""The output's tokenizer gives the source's ids and texts, whatever class its model_type stands for."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import conversions
import gguf_files
import llama2_tokenizer
import models
import pytest
from gguf import GGMLQuantizationType
from llama2_tokenizer import TEXT, VOCAB
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerFast

from upcycle.errors import SourceError
from upcycle.models import tokenizer as tokenizers_of_upcycle
from upcycle.models.load import load_tokenizer_from
from upcycle.models.tokenizer import behaviour, settle_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

EXACT = {"router_order": "topk_softmax"}


@pytest.fixture
def untold(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A model whose directory says nothing about its tokenizer's class."""
    directory = models.save(models.build(request.param, vocab_size=VOCAB), tmp_path / "source")
    llama2_tokenizer.write_tokenizer(directory)
    return directory


def assert_same(source: Path, output: Path, **how: Any) -> None:
    before, after = AutoTokenizer.from_pretrained(source, **how), AutoTokenizer.from_pretrained(output)
    ids = before(TEXT)["input_ids"]
    assert after(TEXT)["input_ids"] == ids
    assert after.decode(ids) == before.decode(ids)
    assert behaviour(after) == behaviour(before)


def convert(source: Path, tmp_path: Path, **changes: Any) -> Path:
    return conversions.run(conversions.options(source, tmp_path / "moe", **changes)).directory


@pytest.mark.parametrize("untold", models.ONE_PER_FAMILY, indirect=True)
def test_of_every_family(untold: Path, tmp_path: Path) -> None:
    assert_same(untold, convert(untold, tmp_path))


@pytest.mark.parametrize(
    ("untold", "target"),
    [("llama", "mixtral"), ("llama", "granitemoeshared"), ("llama", "upcycled_moe"), ("qwen3", "qwen3_moe")]
    + [("olmo2", "flex_olmo"), ("phi3", "mixtral"), ("qwen2", "upcycled_moe")],
    indirect=["untold"],
)
def test_in_every_type(untold: Path, tmp_path: Path, target: str) -> None:
    assert_same(untold, convert(untold, tmp_path, target=target, **EXACT))


@pytest.mark.parametrize("untold", ["llama"], indirect=True)
def test_the_class_is_named_and_said(untold: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "upcycle"):
        output = convert(untold, tmp_path)
    assert json.loads((output / "config.json").read_text())["model_type"] == "qwen2_moe"
    assert json.loads((output / "tokenizer_config.json").read_text()) == {"tokenizer_class": "PreTrainedTokenizerFast"}
    said = "tokenizer_config.json names PreTrainedTokenizerFast"
    assert said in caplog.text
    assert f"- {said}" in (output / "README.md").read_text()
    assert (
        AutoTokenizer.from_pretrained(output).decode(AutoTokenizer.from_pretrained(output)(TEXT)["input_ids"]) == TEXT
    )


@pytest.mark.parametrize("untold", ["llama"], indirect=True)
def test_without_that_it_would_be_another_one(untold: Path, tmp_path: Path) -> None:
    """The mutant: what transformers opens by model_type alone."""
    output = convert(untold, tmp_path)
    (output / "tokenizer_config.json").unlink()
    with pytest.raises(AssertionError):
        assert_same(untold, output)


@pytest.mark.parametrize("untold", ["gpt2"], indirect=True)
def test_what_the_config_says_is_kept(untold: Path, tmp_path: Path) -> None:
    said = {"model_max_length": 99, "chat_template": "{{ messages }}", "eos_token": "</s>", "name": "日本"}
    (untold / "tokenizer_config.json").write_text(json.dumps(said))
    output = convert(untold, tmp_path)
    assert json.loads((output / "tokenizer_config.json").read_text()) == {**said, "tokenizer_class": "GPT2Tokenizer"}
    assert_same(untold, output)


def test_a_class_that_is_known_to_be_wrong(tmp_path: Path) -> None:
    """Transformers takes no notice of what a phi3 model says, and of what an output says it does."""
    source = models.save(models.build("phi3", vocab_size=VOCAB), tmp_path / "source")
    llama2_tokenizer.write_tokenizer(source)
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    assert not isinstance(AutoTokenizer.from_pretrained(source), GPT2Tokenizer)
    output = convert(source, tmp_path)
    assert_same(source, output)
    assert json.loads((output / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.mark.parametrize("target", ["qwen2_moe", "upcycled_moe"])
def test_of_a_gguf_file(tmp_path: Path, target: str) -> None:
    source = gguf_files.write_gguf(tmp_path / "tiny.gguf", [GGMLQuantizationType.F32])
    assert_same(tmp_path, convert(source, tmp_path, target=target), gguf_file=source.name)


@pytest.mark.parametrize("untold", ["llama"], indirect=True)
def test_without_upcycle(untold: Path, tmp_path: Path) -> None:
    output = convert(untold, tmp_path, target="upcycled_moe")
    code = (
        "import sys; sys.modules['upcycle'] = None\n"
        "from transformers import AutoTokenizer\n"
        f"print(AutoTokenizer.from_pretrained({str(output)!r}, trust_remote_code=True)({TEXT!r})['input_ids'])"
    )
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert json.loads(ended.stdout) == AutoTokenizer.from_pretrained(untold)(TEXT)["input_ids"]


def test_a_source_without_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = models.save(models.build("llama"), tmp_path / "source")
    with caplog.at_level(logging.INFO, "upcycle"):
        output = convert(source, tmp_path)
    assert not list(output.glob("tokenizer*"))
    assert "tokenizer" not in caplog.text


@pytest.mark.parametrize("untold", ["llama"], indirect=True)
def test_one_that_cannot_be_opened(untold: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (untold / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(SourceError, match="no tokenizer that transformers can load"):
        load_tokenizer_from(untold)
    output = convert(untold, tmp_path)
    assert (output / "tokenizer.json").read_bytes() == (untold / "tokenizer.json").read_bytes()
    assert "cannot be opened here, so nothing says that it is the source's" in caplog.text
    assert "cannot be opened here" in (output / "README.md").read_text()


@pytest.mark.parametrize("untold", ["llama"], indirect=True)
def test_one_that_cannot_be_made_the_same(untold: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before anything is written."""
    opened = tokenizers_of_upcycle.load_tokenizer_from

    def other(place: Path) -> Any:
        found = opened(place)
        found.chat_template = "{{ another }}"
        return found

    monkeypatch.setattr(tokenizers_of_upcycle, "load_tokenizer_from", other)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SourceError, match=r"would not do what the source's does\n.*differs in 'chat template'"):
        convert(untold, tmp_path)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "change",
    [
        {"eos_token": "<unk>"},
        {"chat_template": "{{ messages }}"},
        {"padding_side": "left"},
        {"model_input_names": ["input_ids"]},
        {"extra_special_tokens": ["<new>"]},
        {
            "clean_up_tokenization_spaces": True,
            "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True,
        },
    ],
    ids=str,
)
def test_what_makes_two_differ(tmp_path: Path, change: dict[str, Any]) -> None:
    for name, settings in (("one", {}), ("other", change)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"model_type": "llama"}')
        llama2_tokenizer.write_tokenizer(tmp_path / name)
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", **settings}
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps(settings))
    one, other = (load_tokenizer_from(tmp_path / name) for name in ("one", "other"))
    assert behaviour(one) == behaviour(load_tokenizer_from(tmp_path / "one"))
    assert behaviour(one) != behaviour(other)
    assert settle_tokenizer(tmp_path / "one", behaviour(one), "PreTrainedTokenizerFast") is None


def test_one_that_cannot_read_every_text(tmp_path: Path) -> None:
    """A word that it lacks is an error in tokenizers, in the source and in the output alike."""
    fast = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="<unk>")))
    fast.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert settle_tokenizer(tmp_path, behaviour(fast), "TokenizersBackend") is None
