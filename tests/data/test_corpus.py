"""A corpus: the split, the windows of each side, mixtures, and too little data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from texts import EOS, corpus, options, texts, write

from upcycle.data.config import DataConfig, DomainConfig
from upcycle.data.corpus import held_out_count
from upcycle.data.order import MixtureOrder, Order
from upcycle.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    return write(tmp_path / "texts", texts(40))


def mixture(root: Path, **changes: Any) -> DataConfig:
    """Two domains, weighted 3 to 1."""
    write(root / "a", texts(40, word="code"))
    write(root / "b", texts(30, word="prose"))
    domains = {
        "code": DomainConfig(name="text", files=f"{root}/a/*.txt", weight=3),
        "prose": DomainConfig(name="text", files=f"{root}/b/*.txt", weight=1),
    }
    fields = {"name": "mixture", "domains": domains, "held_out": 4, "cache_dir": str(root / "cache")}
    return DataConfig(**fields | changes)


def texts_in(tokens: list[int]) -> set[str]:
    """The texts of a token stream that begins with a document; its last may be cut off."""
    data = [[]]
    for token in tokens:
        if token == EOS:
            data.append([])
        else:
            data[-1].append(token)
    return {bytes(ids).decode() for ids in data[:-1]}


def test_training_and_held_out_text_are_apart(documents: Path) -> None:
    made = corpus(options(documents, held_out=5))
    held_out = texts_in(made.held_out["text"].tokens.tolist())
    (train,) = made.train.datasets
    assert len(held_out) == 5
    assert held_out | texts_in(train.tokens.tolist()) == set(texts(40))
    assert made.documents == 40
    assert made.tokens == sum(len(text.encode()) + 1 for text in texts(40))
    size = sum(len(text.encode()) for text in held_out)
    assert made.bytes_per_token == {"text": size / (size + 5)}


def test_the_same_documents_are_held_out_wherever_they_are(documents: Path, tmp_path: Path) -> None:
    first = corpus(options(documents, held_out=5))
    write(tmp_path / "other", texts(40)[::-1])
    second = corpus(options(tmp_path / "other", held_out=5))
    assert first.held_out["text"].tokens.tolist() == second.held_out["text"].tokens.tolist()
    longer = corpus(options(documents, held_out=6))
    assert texts_in(first.held_out["text"].tokens.tolist()) < texts_in(longer.held_out["text"].tokens.tolist())


@pytest.mark.parametrize(("held_out", "expected"), [(0, 0), (0.0, 0), (1, 1), (3, 4), (0.1, 1), (0.5, 6), (10, 11)])
def test_how_many_are_held_out(held_out: float, expected: int) -> None:
    """Of ten documents, the second of which is there twice; a copy goes with its original."""
    digests = sorted([bytes([number]) for number in range(10)] + [bytes([1])])
    assert held_out_count(digests, held_out) == expected


def test_none_held_out(documents: Path) -> None:
    made = corpus(options(documents, held_out=0))
    assert (made.held_out, made.bytes_per_token) == ({}, {})


def test_positions_are_those_of_the_part(documents: Path) -> None:
    made = corpus(options(documents, held_out=5, document_attention=True))
    for windows in (made.held_out["text"], made.train):
        for index in range(len(windows)):
            item = windows[index]
            begins = torch.cat([torch.tensor([True]), item["input_ids"][:-1] == EOS])
            assert torch.equal(item["position_ids"] == 0, begins)


def test_a_mixture(tmp_path: Path) -> None:
    made = corpus(mixture(tmp_path))
    code, prose = made.train.datasets
    assert all(text.startswith("code") for text in texts_in(code.tokens.tolist()))
    assert set(made.held_out) == set(made.bytes_per_token) == {"code", "prose"}
    assert all(text.startswith("prose") for text in texts_in(made.held_out["prose"].tokens.tolist()))
    order = made.order(0)
    assert isinstance(order, MixtureOrder)
    drawn = [order[position] for position in range(1024)]
    assert sum(index < len(code) for index in drawn) == 768
    assert max(drawn) == len(made.train) - 1


def test_the_order_of_one_domain_is_permuted_epochs(documents: Path) -> None:
    order = corpus(options(documents)).order(3)
    assert isinstance(order, Order)
    assert order.length == len(corpus(options(documents)).train)


def test_the_hash_names_the_content(documents: Path, tmp_path: Path) -> None:
    one = corpus(options(documents)).hash
    assert corpus(options(documents), length=4).hash == one
    mixed = corpus(mixture(tmp_path)).hash
    domain = corpus(options(tmp_path / "a")).hash
    assert len({one, mixed, domain}) == 3


@pytest.mark.parametrize("length", [0, -1])
def test_no_sequence_length(documents: Path, length: int) -> None:
    with pytest.raises(ConfigError, match="sequence_length is not positive"):
        corpus(options(documents), length=length)


@pytest.mark.parametrize("held_out", [-1, 1.5, float("nan")])
def test_bad_held_out(documents: Path, held_out: float) -> None:
    with pytest.raises(ConfigError, match="data.held_out is not valid"):
        corpus(options(documents, held_out=held_out))


def test_too_little_data(tmp_path: Path) -> None:
    write(tmp_path / "texts", ["tiny", "text", ""])
    with pytest.raises(ConfigError, match=r"too little training data in text\n.*10 tokens\n.*at least 11 "):
        corpus(options(tmp_path / "texts"), length=10)
    assert len(corpus(options(tmp_path / "texts"), length=9).train) == 1
    write(tmp_path / "texts", texts(10))
    with pytest.raises(ConfigError, match=r"too little held-out data in text\n.* tokens\n(.*\n)*.*data.held_out"):
        corpus(options(tmp_path / "texts", held_out=1), length=40)


def test_no_text(tmp_path: Path) -> None:
    write(tmp_path / "texts", ["", ""])
    with pytest.raises(ConfigError, match="there is no text"):
        corpus(options(tmp_path / "texts"))


def test_everything_held_out(documents: Path, tmp_path: Path) -> None:
    """What the remedy says works."""
    refused = r"leaves no document of text for training\n.*40 documents, 40 of them different, held_out=40\n.*to 39 or"
    with pytest.raises(ConfigError, match=refused):
        corpus(options(documents, held_out=40))
    assert corpus(options(documents, held_out=39), length=2).documents == 40
    write(tmp_path / "copies", ["one text of which there are copies"] * 3)
    with pytest.raises(ConfigError, match=r"3 documents, 1 of them diff.*\n.*give more documents, or.*held_out=0 "):
        corpus(options(tmp_path / "copies", held_out=1))
    assert not corpus(options(tmp_path / "copies", held_out=0)).held_out
