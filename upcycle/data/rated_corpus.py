"""Rows with attributes -> token ids, padded, with labels. Legend: S sequence length, A attributes, R rows."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from upcycle.data.corpus import check_held_out, held_out_count, none_left
from upcycle.data.order import Order
from upcycle.data.rated import MASK, read_rated
from upcycle.data.tokens import tokenizer_identity
from upcycle.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from upcycle.data.config import DataConfig
    from upcycle.data.rated import Rated

_log = logging.getLogger("upcycle")


class RatedRows(Dataset[dict[str, Tensor]]):
    """Row i has `input_ids` and `attention_mask` [S], int64, padded at the end, and `labels` [A], float32.

    Args:
        ids: token ids of each row, at most S.
        labels_RA: MASK where there is none.
        sequence_length: S.
        padding: id of the padding.
    """

    def __init__(
        self, ids: Sequence[NDArray[np.int64]], labels_RA: Tensor, *, sequence_length: int, padding: int
    ) -> None:
        self.ids, self.labels_RA = ids, labels_RA
        self.sequence_length, self.padding = sequence_length, padding

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.from_numpy(self.ids[index])
        input_ids = torch.full((self.sequence_length,), self.padding, dtype=torch.int64)
        input_ids[: len(ids)] = ids
        attention_mask = (torch.arange(self.sequence_length) < len(ids)).long()
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": self.labels_RA[index]}


@dataclass(frozen=True, kw_only=True)
class RatedCorpus:
    """Texts with attributes, as a `Corpus` is text.

    Attributes:
        attributes: of the labels, in their order.
        train: rows.
        held_out: rows kept from training, under the name of the data; empty if none are.
        hash: SHA-256 that identifies tokens and labels.
        tokens: of all rows, without padding.
        documents: rows.
    """

    attributes: tuple[str, ...]
    train: RatedRows
    held_out: dict[str, RatedRows]
    hash: str
    tokens: int
    documents: int

    def order(self, seed: int) -> Order:
        """Which row of `train` is at a position: permuted epochs."""
        return Order(len(self.train), seed)


def build_rated(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    attributes: Sequence[str],
    padding: int,
    sequence_length: int,
) -> RatedCorpus:
    """Read, tokenise and split texts with attributes.

    A row ends with the end of text. Of a longer one than S the last S tokens are kept, and how many those are is said.

    Args:
        config: the options.
        tokenizer: a fast tokenizer with an end of text.
        attributes: of the model, in the order of its scores; those that the data has not are masked.
        padding: id of the padding.
        sequence_length: S.

    Raises:
        ConfigError: options that cannot work, or no row left for training.
        MissingPackageError: the package with the data is not installed.
        SourceError: data that cannot be read, or labels that are no numbers.
    """
    check_held_out(config.held_out)
    names, identity = config.rated(), tokenizer_identity(tokenizer)
    rows = sorted(((_digest(row), row) for row in read_rated(config)), key=lambda each: (each[0], each[1].labels))
    if not rows:
        raise ConfigError("there is no text", found="0 rows", expected="a row with text and a label")
    held_out = held_out_count([digest for digest, _ in rows], config.held_out)
    if held_out == len(rows):
        raise none_left(config, config.name, [digest for digest, _ in rows])
    texts = [row.text for _, row in rows]
    tokenised = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    whole = [np.array([*ids, tokenizer.eos_token_id], dtype=np.int64) for ids in tokenised]
    cut = sum(len(ids) > sequence_length for ids in whole)
    if cut:
        _log.warning("%d of %d rows are longer than sequence_length: their first tokens are left out", cut, len(whole))
    ids = [each[-sequence_length:] for each in whole]
    labels_RA = torch.tensor([_ordered(row, names, attributes) for _, row in rows], dtype=torch.float32)
    contents = "".join(f"{digest.hex()} {row.labels}\n" for digest, row in rows)

    def part(first: int, last: int) -> RatedRows:
        return RatedRows(ids[first:last], labels_RA[first:last], sequence_length=sequence_length, padding=padding)

    _log.info("%s: %d rows, %d held out", config.name, len(rows), held_out)
    return RatedCorpus(
        attributes=tuple(attributes),
        train=part(held_out, len(rows)),
        held_out={config.name: part(0, held_out)} if held_out else {},
        hash=hashlib.sha256(f"{identity} {names}\n{contents}".encode()).hexdigest(),
        tokens=sum(map(len, ids)),
        documents=len(rows),
    )


def _digest(row: Rated) -> bytes:
    return hashlib.sha256(row.text.encode()).digest()


def _ordered(row: Rated, names: Sequence[str], attributes: Sequence[str]) -> list[float]:
    """The labels of a row in the order of a model's scores."""
    labels = dict(zip(names, row.labels, strict=True))
    return [labels.get(name, MASK) for name in attributes]
