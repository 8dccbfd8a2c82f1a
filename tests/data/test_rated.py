"""Texts with attributes: rows of files, two lexicons, labels that are masked, and those that are refused."""

from __future__ import annotations

import json
import math
import sys
from typing import TYPE_CHECKING, Any

import pyarrow
import pytest
import rewards
import torch
from pyarrow import parquet
from texts import EOS, tokenizer

from upcycle.data.config import DataConfig
from upcycle.data.lexicons import LEXICONS
from upcycle.data.rated import MASK, read_rated
from upcycle.data.rated_corpus import RatedCorpus, build_rated
from upcycle.errors import ConfigError, MissingPackageError, SourceError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

LENGTH = 48


def config(file: Path | str | None = None, *, attributes: Sequence[str] | None = None, **more: Any) -> DataConfig:
    named = list(rewards.ATTRIBUTES) if attributes is None else list(attributes)
    return DataConfig(**{"name": "attributes", "files": file and str(file), "attributes": named, "held_out": 5} | more)


def corpus(options: DataConfig, *, attributes: Sequence[str] = rewards.ATTRIBUTES, length: int = LENGTH) -> RatedCorpus:
    return build_rated(options, tokenizer(), attributes=attributes, padding=7, sequence_length=length)


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(rewards.lexicons(tmp_path / "packages"))
    for name in ("textblob", "vaderSentiment"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_rows(tmp_path: Path) -> None:
    file = rewards.rated(tmp_path / "ratings.jsonl")
    rows = read_rated(config(file))
    assert len(rows) == 40
    assert rows[1].text == "What is parser 1?\n\nargument parser"
    assert rows[1].labels == (1.0, 3.0, 1.0)
    assert rows[3].labels == (3.0, MASK, 2.0)


def test_parquet_is_the_same(tmp_path: Path) -> None:
    file = rewards.rated(tmp_path / "ratings.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "ratings.parquet")
    assert read_rated(config(tmp_path / "ratings.parquet")) == read_rated(config(file))


def test_a_text_column_goes_before_prompt_and_response(tmp_path: Path) -> None:
    file = rewards.rated(tmp_path / "ratings.jsonl", text="the text", review="the review")
    assert {row.text for row in read_rated(config(file))} == {"the text"}
    assert {row.text for row in read_rated(config(file, field="review"))} == {"the review"}


def test_what_a_row_does_not_have_is_masked(tmp_path: Path) -> None:
    rows = [{"text": "a", "x": 1}, {"text": "b", "x": -100, "y": 2}, {"text": "c"}, {"text": "", "x": 1}]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    assert [(row.text, row.labels) for row in read_rated(config(file, attributes=["x", "y"]))] == [
        ("a", (1.0, MASK)),
        ("b", (MASK, 2.0)),
    ]


@pytest.mark.parametrize("label", [math.nan, math.inf, "good", True, [1]])
def test_labels_that_are_no_numbers(label: Any, tmp_path: Path) -> None:
    file = rewards.rated(tmp_path / "ratings.jsonl", verbosity=label)
    with pytest.raises(SourceError, match=r"the label verbosity is not a number[\s\S]*ratings.jsonl:1"):
        read_rated(config(file))


def test_an_attribute_without_labels(tmp_path: Path) -> None:
    file = rewards.rated(tmp_path / "ratings.jsonl")
    with pytest.raises(SourceError, match=r"no row has a label of coherence[\s\S]*leave it out"):
        read_rated(config(file, attributes=["verbosity", "coherence"]))


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("rows.csv", "text,x\na,1\n", "columns of numbers are not read"),
        ("rows.txt", "a text", "the file has no rows"),
        ("rows.jsonl", '{"x": 1}', "no field text"),
        ("rows.jsonl", '"a text"', "no field text"),
        ("rows.jsonl", '{"text": 3, "x": 1}', "is not text"),
    ],
)
def test_files_that_hold_none(name: str, content: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(SourceError, match=problem):
        read_rated(config(tmp_path / name, attributes=["x"]))


def test_options() -> None:
    with pytest.raises(ConfigError, match=r"needs texts with attributes[\s\S]*objective=causal_lm"):
        DataConfig(name="python_stdlib").rated()
    with pytest.raises(ConfigError, match=r"texts with attributes[\s\S]*objective=regression"):
        DataConfig(name="textblob").sources()
    with pytest.raises(ConfigError, match="needs the names of its attributes"):
        config("a.jsonl", attributes=[]).rated()
    with pytest.raises(ConfigError, match=r"found: +polarity, humour"):
        DataConfig(name="textblob", attributes=["polarity", "humour"]).rated()
    with pytest.raises(ConfigError, match="does not apply to vader"):
        DataConfig(name="vader", files="a.jsonl").rated()
    assert DataConfig(name="vader").rated() == ("valence", "deviation")


def test_rows_are_padded_and_ended(tmp_path: Path) -> None:
    made = corpus(config(rewards.rated(tmp_path / "ratings.jsonl")))
    items = [made.train[index] for index in range(len(made.train))]
    assert len(items) == made.documents - 5 == 35
    for item in items:
        size = int(item["attention_mask"].sum())
        assert item["input_ids"].shape == item["attention_mask"].shape == (LENGTH,)
        assert item["input_ids"][size - 1] == EOS
        assert item["input_ids"][size:].eq(7).all()
        assert item["attention_mask"][:size].all()
        assert item["labels"].dtype == torch.float32
    held_out = made.held_out["attributes"]
    items += [held_out[index] for index in range(len(held_out))]
    assert made.tokens == sum(int(item["attention_mask"].sum()) for item in items)


def test_the_end_of_a_long_row_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = rewards.rated(tmp_path / "ratings.jsonl")
    whole, short = corpus(config(file), length=200), corpus(config(file), length=24)
    warned = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert warned == ["40 of 40 rows are longer than sequence_length: their first tokens are left out"]
    for one, other in zip(whole.train, short.train, strict=True):
        ids = one["input_ids"][: int(one["attention_mask"].sum())]
        assert torch.equal(other["input_ids"][: min(24, len(ids))], ids[-24:])


def test_labels_follow_the_model_s_order(tmp_path: Path) -> None:
    file = rewards.rated(tmp_path / "ratings.jsonl")
    own = corpus(config(file)).train.labels_RA
    other = corpus(config(file), attributes=("verbosity", "humor", *rewards.ATTRIBUTES[:2])).train.labels_RA
    assert torch.equal(other[:, [2, 3, 0]], own)
    assert other[:, 1].eq(MASK).all()


def test_held_out_rows_and_the_hash_are_of_the_content(tmp_path: Path) -> None:
    file = rewards.rated(tmp_path / "ratings.jsonl")
    first = corpus(config(file))
    backwards = tmp_path / "backwards.jsonl"
    backwards.write_text("\n".join(reversed(file.read_text().splitlines())))
    second = corpus(config(backwards))
    assert first.hash == second.hash
    assert torch.equal(first.train.labels_RA, second.train.labels_RA)
    file.write_text(file.read_text().replace('"verbosity": 0.5', '"verbosity": 0.25'))
    assert corpus(config(file)).hash != first.hash
    with pytest.raises(ConfigError, match="leaves no document of attributes for training"):
        corpus(config(file, held_out=40))


@pytest.mark.usefixtures("packages")
def test_lexicons() -> None:
    senses = read_rated(DataConfig(name="textblob"))
    assert len(senses) == 24
    assert (senses[0].text, senses[0].labels) == ("nice0: giving pleasure in the 0th way", (0.6, 0.0))
    words = read_rated(DataConfig(name="vader", attributes=["valence"]))
    assert [(row.text, row.labels) for row in words[:2]] == [("word0", (-4.0,)), ("word1", (-3.0,))]


@pytest.mark.usefixtures("packages")
def test_a_damaged_lexicon(tmp_path: Path) -> None:
    (tmp_path / "packages/textblob/en/en-sentiment.xml").write_text("<sentiment>")
    (tmp_path / "packages/vaderSentiment/vader_lexicon.txt").write_text("word 1.0\n")
    for name in LEXICONS:
        with pytest.raises(SourceError, match="the lexicon is damaged"):
            read_rated(DataConfig(name=name))
    (tmp_path / "packages/textblob/en/en-sentiment.xml").unlink()
    with pytest.raises(SourceError, match="textblob has no lexicon"):
        read_rated(DataConfig(name="textblob"))


@pytest.mark.parametrize(("name", "package"), [("textblob", "textblob"), ("vader", "vaderSentiment")])
def test_a_package_that_is_not_there(name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError, match=r"pip install 'upcycle\[reward\]'"):
        read_rated(DataConfig(name=name))
