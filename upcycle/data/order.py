"""The order of training samples: a pure function of (seed, position), without end and without state.

Knows lengths, weights and indices, not data. Nothing here depends on a library's random numbers, so an order stays what
it is across versions.
"""

from __future__ import annotations

import hashlib
from itertools import accumulate, count, islice
from typing import TYPE_CHECKING, Protocol

import numpy as np
from torch.utils.data import Sampler

from upcycle.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

ROUNDS = 4  # a Feistel network of four rounds is a strong pseudorandom permutation (Luby and Rackoff, 1988)
BLOCK = 1024  # positions in which a mixture has its exact shares


class SampleOrder(Protocol):
    """Which sample is at a position: 0, 1, 2, … without end."""

    def __getitem__(self, position: int) -> int: ...


class Order:
    """Every epoch is its own permutation of range(length).

    Args:
        length: number of samples.
        seed: seed of the order.
        name: gives an order of its own to each part of a mixture.
    """

    def __init__(self, length: int, seed: int, *, name: str = "") -> None:
        assert length > 0
        self.length, self.seed, self.name = length, seed, name

    def __getitem__(self, position: int) -> int:
        """The index of the sample at a position (>= 0)."""
        epoch, place = divmod(position, self.length)
        key = hashlib.blake2b(f"{self.seed}/{epoch}/{self.name}".encode(), digest_size=32).digest()
        return _permuted(place, self.length, key)


class MixtureOrder:
    """Domains drawn by weight: each has its share of every BLOCK positions, and its samples in an Order of its own.

    Indices count through the domains one after the other.

    Args:
        lengths: number of samples of each domain.
        weights: of the domains, relative to each other; shares are rounded to 1/BLOCK.
        seed: seed of the order.

    Raises:
        ConfigError: a domain whose share rounds to nothing.
    """

    def __init__(self, lengths: Mapping[str, int], weights: Mapping[str, float], seed: int) -> None:
        self.seed = seed
        self.orders = [Order(length, seed, name=f"domain {name}") for name, length in lengths.items()]
        self.offsets = [0, *accumulate(lengths.values())]
        shares = np.array([weights[name] for name in lengths], dtype=np.float64)
        # Rounding the cumulated shares keeps their sum: the last boundary is BLOCK.
        self.slots = [0, *np.rint(np.cumsum(shares) / shares.sum() * BLOCK).astype(int).tolist()]
        for name, start, end in zip(lengths, self.slots, self.slots[1:], strict=False):
            if start == end:
                raise ConfigError(
                    f"data.domains.{name} is too small a share of the mixture",
                    found=f"weight {weights[name]:g} of {shares.sum():g}",
                    expected=f"at least 1/{BLOCK}",
                    remedy="raise its weight or leave the domain out",
                )

    def __getitem__(self, position: int) -> int:
        """The index of the sample at a position (>= 0)."""
        block, place = divmod(position, BLOCK)
        # The slots of a block, shuffled, say both the domain and how many of its samples came before.
        slot = Order(BLOCK, self.seed, name=f"block {block}")[place]
        domain = int(np.searchsorted(self.slots, slot, side="right")) - 1
        start, end = self.slots[domain : domain + 2]
        return self.offsets[domain] + self.orders[domain][block * (end - start) + slot - start]


class PositionSampler(Sampler[list[int]]):
    """Endless batches of indices, from any sample on. The global batch does not depend on the number of ranks.

    Args:
        order: which sample is at a position.
        start: position of the first sample, over all ranks.
        batch_size: samples of a batch over all ranks.
        rank: this process; it takes its slice of every batch.
        world: number of processes.

    Raises:
        ConfigError: a batch that cannot be divided among the ranks.
    """

    def __init__(self, order: SampleOrder, *, start: int, batch_size: int, rank: int = 0, world: int = 1) -> None:
        if batch_size < 1 or batch_size % world:
            raise ConfigError(
                "the batch cannot be divided among the processes",
                found=f"{batch_size} samples for {world} processes",
                expected="a positive multiple of the number of processes",
                remedy="change the batch size",
            )
        self.order, self.start, self.batch_size = order, start, batch_size
        self.share, self.rank = batch_size // world, rank

    def __iter__(self) -> Iterator[list[int]]:
        for batch in count(self.start + self.rank * self.share, self.batch_size):
            yield [self.order[position] for position in range(batch, batch + self.share)]


def order_hash(order: SampleOrder, samples: int) -> str:
    """SHA-256 of the first `samples` indices, as 64 hexadecimal digits."""
    indices = np.fromiter((order[position] for position in islice(count(), samples)), dtype="<i8", count=samples)
    return hashlib.sha256(indices.tobytes()).hexdigest()


def _permuted(index: int, length: int, key: bytes) -> int:
    """Image of an index under the permutation of range(length) that a key stands for.

    A Feistel network permutes the numbers of 2*half bits; what falls outside the range is permuted again until it falls
    inside (cycle walking, Black and Rogaway 2002).
    """
    half = max(1, ((length - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for number in range(ROUNDS):
            mixed = hashlib.blake2b(right.to_bytes(8, "little"), digest_size=8, key=key, salt=bytes([number])).digest()
            left, right = right, left ^ int.from_bytes(mixed, "little") & mask
        index = left << half | right
        if index < length:
            return index
