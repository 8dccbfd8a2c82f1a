"""Documents -> one token file, in the order of the documents' content hashes, and its cache key.

The order by hash does not depend on where the documents lie, and makes the held-out documents, those with the smallest
hashes, the file's beginning. Legend: D documents, T tokens.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from upcycle.data.cache import BOUNDS, TOKENS, TokenFile, cached_tokens
from upcycle.errors import ConfigError, SourceError
from upcycle.models.tokenizer import backend_state

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from upcycle.data.sources import Documents

FORMAT = 1  # of the token file; another one is another key
BATCH_BYTES = 2**23  # text tokenised at once


@dataclass(frozen=True, kw_only=True)
class Tokenised:
    """A source's tokens.

    Attributes:
        file: tokens and bounds of the documents, each ended by the end-of-text token, by content hash.
        digests: SHA-256 of every document's UTF-8 text, sorted.
        key: SHA-256 of what decides the tokens: contents, tokenizer and format.
    """

    file: TokenFile
    digests: list[bytes]
    key: str


def tokenise(documents: Documents, tokenizer: PreTrainedTokenizerBase, cache: Path) -> Tokenised:
    """Tokenise documents, or open the tokens of earlier.

    Raises:
        ConfigError: no text; a tokenizer without end of text, or without the fast implementation.
        SourceError: a document that cannot be read, or documents that change while they are read.
        OutputError: the cache cannot be written.
    """
    identity = tokenizer_identity(tokenizer)
    digests = [hashlib.sha256(text.encode()).digest() for text in documents]
    if not digests:
        raise ConfigError("there is no text", found="0 documents", expected="a document with text in it")
    ranks = sorted(range(len(digests)), key=digests.__getitem__)
    ordered = [digests[rank] for rank in ranks]
    key = hashlib.sha256(f"{FORMAT} {identity} ".encode() + b"".join(ordered)).hexdigest()

    def build(directory: Path) -> None:
        _build(directory, documents, tokenizer, digests, ranks)

    return Tokenised(file=cached_tokens(cache, key, build), digests=ordered, key=key)


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what a tokenizer does to a text.

    Raises:
        ConfigError: a tokenizer without end of text, or without the fast implementation.
    """
    name = type(tokenizer).__name__
    if not tokenizer.is_fast:
        raise ConfigError("the tokenizer is too slow", found=name, expected="a fast tokenizer (tokenizer.json)")
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            "the tokenizer has no end-of-text token", found=name, remedy="set eos_token in tokenizer_config.json"
        )
    kept = backend_state(tokenizer)
    kept["upcycle"] = [tokenizer.eos_token_id, getattr(tokenizer, "split_special_tokens", False)]
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _build(
    directory: Path, documents: Documents, tokenizer: PreTrainedTokenizerBase, digests: list[bytes], ranks: list[int]
) -> None:
    """Write the tokens as the documents come, then in order, so that memory holds no more than a batch of either."""
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    sizes = np.zeros((len(digests), 2), dtype=np.int64)
    arrived = directory / "arrived.bin"
    with arrived.open("wb") as stream:
        number = 0
        for texts in _batches(documents):
            ids = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
            for text, tokens in zip(texts, ids, strict=True):
                encoded = text.encode()
                if number == len(digests) or hashlib.sha256(encoded).digest() != digests[number]:
                    raise _changed()
                sizes[number] = len(tokens) + 1, len(encoded)
                stream.write(np.array([*tokens, tokenizer.eos_token_id], dtype=dtype).tobytes())
                number += 1
    if number != len(digests):
        raise _changed()
    bounds = np.concatenate([np.zeros((1, 2), dtype=np.int64), sizes[ranks].cumsum(axis=0)])
    np.save(directory / BOUNDS, bounds)
    starts = np.concatenate([[0], sizes[:, 0].cumsum()])
    source = np.memmap(arrived, dtype=dtype, mode="r")
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (int(bounds[-1, 0]),)}
    with (directory / TOKENS).open("wb") as stream:  # a memory-mapped target would die of a full disk
        np.lib.format.write_array_header_1_0(stream, header)
        for rank in ranks:
            stream.write(source[starts[rank] : starts[rank + 1]].data)
    arrived.unlink()


def _batches(documents: Documents) -> Iterator[list[str]]:
    """Documents by batches, over which the tokenizer spreads its threads."""
    batch: list[str] = []
    size = 0
    for text in documents:
        batch.append(text)
        size += len(text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _changed() -> SourceError:
    return SourceError("the documents changed while they were read", remedy="run again once nothing writes them")
