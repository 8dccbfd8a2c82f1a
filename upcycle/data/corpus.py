"""Options -> a corpus: tokens of every domain, the documents held out, and windows over the rest."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch.utils.data import ConcatDataset

from upcycle.data.cache import default_cache
from upcycle.data.order import MixtureOrder, Order, SampleOrder
from upcycle.data.sources import open_documents
from upcycle.data.tokens import Tokenised, tokenise
from upcycle.data.windows import Windows
from upcycle.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from upcycle.data.config import DataConfig

_log = logging.getLogger("upcycle")


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Tokenised text of one or more domains.

    Attributes:
        train: windows of the domains one after the other; `order` says how to mix them.
        held_out: windows of the documents kept from training, by domain; empty if none are.
        weights: of the domains in training.
        hash: SHA-256 that identifies the tokens of every domain.
        tokens: of all domains, held out or not, with an end of text after every document.
        documents: of all domains.
        bytes_per_token: by domain, UTF-8 bytes of the held-out text per token; a loss in nats per token divided by it
            is in nats per byte.
    """

    train: ConcatDataset[dict[str, Tensor]]
    held_out: dict[str, Windows]
    weights: dict[str, float]
    hash: str
    tokens: int
    documents: int
    bytes_per_token: dict[str, float]

    def order(self, seed: int) -> SampleOrder:
        """Which window of `train` is at a position: permuted epochs, or a mixture by weight."""
        if len(self.weights) == 1:
            return Order(len(self.train), seed)
        lengths = [len(domain) for domain in self.train.datasets]  # type: ignore[arg-type]
        return MixtureOrder(dict(zip(self.weights, lengths, strict=True)), self.weights, seed)


@dataclass(frozen=True, kw_only=True)
class _Domain:
    train: Windows
    held_out: Windows
    bytes_per_token: float
    tokenised: Tokenised


def build_corpus(config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, sequence_length: int) -> Corpus:
    """Read, tokenise and split the data, using the token cache.

    Args:
        config: the options.
        tokenizer: a fast tokenizer with an end of text.
        sequence_length: L, tokens that a model reads at once.

    Raises:
        ConfigError: options that cannot work, or too little data for one window.
        SourceError: data that cannot be read.
        OutputError: the token cache cannot be written.
    """
    if sequence_length < 1:
        raise ConfigError("sequence_length is not positive", found=sequence_length, expected="at least 1")
    check_held_out(config.held_out)
    cache = Path(config.cache_dir).expanduser() if config.cache_dir else default_cache()
    domains = {}
    for name, source in config.sources().items():
        tokenised = tokenise(open_documents(source), tokenizer, cache)
        domains[name] = _domain(config, name, tokenised, sequence_length)
    contents = "".join(f"{name}={domain.tokenised.key}\n" for name, domain in domains.items())
    return Corpus(
        train=ConcatDataset([domain.train for domain in domains.values()]),
        held_out={name: domain.held_out for name, domain in domains.items()} if config.held_out else {},
        weights=config.weights(),
        hash=hashlib.sha256(contents.encode()).hexdigest(),
        tokens=sum(len(domain.tokenised.file.tokens) for domain in domains.values()),
        documents=sum(len(domain.tokenised.digests) for domain in domains.values()),
        bytes_per_token={name: domain.bytes_per_token for name, domain in domains.items()} if config.held_out else {},
    )


def check_held_out(held_out: float) -> None:
    """Check `data.held_out`.

    Raises:
        ConfigError: neither a number of documents nor a share of them.
    """
    if not (0 <= held_out < 1 or float(held_out).is_integer()) or held_out < 0:
        raise ConfigError(
            "data.held_out is not valid", found=held_out, expected="a number of documents, or a fraction below 1"
        )


def none_left(config: DataConfig, name: str, digests: Sequence[bytes]) -> ConfigError:
    """The error for data of which all is held out."""
    distinct = len(set(digests))
    return ConfigError(
        f"data.held_out leaves no document of {name} for training",
        found=f"{len(digests)} documents, {distinct} of them different, held_out={config.held_out:g}",
        remedy=f"set data.held_out to {distinct - 1} or less, or to 0 to hold out none"
        if distinct > 1
        else "give more documents, or set data.held_out=0 to hold out none",
    )


def held_out_count(digests: Sequence[bytes], held_out: float) -> int:
    """How many documents, of those with sorted content hashes, are held out: the ones with the smallest hashes.

    So they are the same whatever the seed and the order of the files. Copies of a document stay together.
    """
    distinct = sorted(set(digests))
    wanted = int(held_out) if held_out >= 1 else max(1, round(held_out * len(distinct))) if held_out else 0
    kept = set(distinct[:wanted])
    return sum(digest in kept for digest in digests)


def _domain(config: DataConfig, name: str, tokenised: Tokenised, sequence_length: int) -> _Domain:
    file, documents = tokenised.file, len(tokenised.digests)
    held_out = held_out_count(tokenised.digests, config.held_out)
    if documents and held_out == documents:
        raise none_left(config, name, tokenised.digests)
    split, split_bytes = map(int, file.bounds[held_out])
    starts = file.bounds[:-1, 0]

    def windows(first: int, last: int) -> Windows:
        begin, end = int(file.bounds[first, 0]), int(file.bounds[last, 0])
        return Windows(
            file.tokens[begin:end],
            starts[first:last] - begin,
            sequence_length=sequence_length,
            document_attention=config.document_attention,
        )

    parts = {"training": windows(held_out, documents)} | ({"held-out": windows(0, held_out)} if held_out else {})
    for part, made in parts.items():
        if not len(made):
            raise ConfigError(
                f"too little {part} data in {name}",
                found=f"{len(made.tokens)} tokens",
                expected=f"at least {sequence_length + 1} for one window",
                remedy="lower sequence_length, " + ("add data" if part == "training" else "raise data.held_out"),
            )
    _log.info("%s: %d documents, %d tokens, %d documents held out", name, documents, len(file.tokens), held_out)
    return _Domain(
        train=parts["training"],
        held_out=windows(0, held_out),
        bytes_per_token=split_bytes / split if split else 0.0,
        tokenised=tokenised,
    )
