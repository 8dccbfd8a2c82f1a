"""The order of samples: permutations, exact shares, and the same batches whatever the start and the ranks."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from itertools import islice

import pytest

from upcycle.data.order import BLOCK, MixtureOrder, Order, PositionSampler, order_hash
from upcycle.errors import ConfigError

LENGTHS = {"code": 700, "prose": 300, "rare": 5}
WEIGHTS = {"code": 3.0, "prose": 1.0, "rare": 0.01}
GOLDEN = [0, 6, 8, 4, 3, 5, 9, 2, 1, 7]
GOLDEN_MIXTURE = "94a3310a268f6e0ce2b8d891ef47ac54bf5ecf66825c72e430cc6c8c03ad9a3a"


def take(order: Order | MixtureOrder, start: int, count: int) -> list[int]:
    return [order[position] for position in range(start, start + count)]


@pytest.mark.parametrize("length", [1, 2, 3, 5, 16, 17, 100, 4097])
def test_every_epoch_is_a_permutation_of_its_own(length: int) -> None:
    order = Order(length, 0)
    epochs = [take(order, epoch * length, length) for epoch in range(3)]
    assert all(sorted(epoch) == list(range(length)) for epoch in epochs)
    if length > 5:
        assert len({tuple(epoch) for epoch in epochs}) == 3
        assert take(Order(length, 1), 0, length) != epochs[0]


def test_the_permutation_is_uniform() -> None:
    """Each of 10 samples is first about 400 times in 4,000 epochs; 6 standard deviations are 114."""
    first = Counter(Order(10, seed)[0] for seed in range(4000))
    assert all(abs(first[index] - 400) < 114 for index in range(10))
    pairs = Counter(Order(10, seed)[1] - Order(10, seed)[0] for seed in range(4000))
    assert abs(pairs[1] - 400) < 114  # of 90 ordered pairs 9 differ by one; neighbours stay no more often than others


def test_the_order_does_not_change() -> None:
    """A value that must never change, or no run can be resumed after an update."""
    assert take(Order(10, 0), 0, 10) == GOLDEN
    assert order_hash(MixtureOrder(LENGTHS, WEIGHTS, 3), 50) == GOLDEN_MIXTURE


def test_another_process_sees_the_same_order() -> None:
    code = "from upcycle.data.order import *; print(order_hash(Order(1000, 7), 3000))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == order_hash(Order(1000, 7), 3000)


def test_a_mixture_has_its_shares() -> None:
    order = MixtureOrder(LENGTHS, WEIGHTS, 0)
    bounds = {"code": range(700), "prose": range(700, 1000), "rare": range(1000, 1005)}
    for block in range(3):
        drawn = take(order, block * BLOCK, BLOCK)
        found = {name: sum(index in part for index in drawn) for name, part in bounds.items()}
        assert found == {"code": 766, "prose": 255, "rare": 3}  # 3, 1 and 0.01 of 4.01


def test_a_domain_of_a_mixture_goes_through_its_epochs() -> None:
    order = MixtureOrder(LENGTHS, WEIGHTS, 0)
    drawn = Counter(index for index in take(order, 0, 4 * BLOCK) if index in range(700, 1000))
    assert sum(drawn.values()) == 4 * 255
    assert set(drawn) == set(range(700, 1000))
    assert set(drawn.values()) == {3, 4}  # 1,020 draws of 300 samples


def test_domains_are_interleaved() -> None:
    drawn = [index >= 700 for index in take(MixtureOrder(LENGTHS, WEIGHTS, 0), 0, BLOCK)]
    longest = max(len(run) for run in "".join("x" if prose else " " for prose in drawn).split())
    assert longest < 12  # chance of a longer run of a quarter of the samples: 1e-4


def test_a_share_too_small() -> None:
    with pytest.raises(ConfigError, match="data.domains.rare is too small a share"):
        MixtureOrder(LENGTHS, WEIGHTS | {"rare": 1e-4}, 0)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_batches_do_not_depend_on_the_ranks(world: int) -> None:
    order = Order(37, 0)
    ranks = [
        list(islice(PositionSampler(order, start=0, batch_size=4, rank=rank, world=world), 20)) for rank in range(world)
    ]
    batches = [sum(parts, []) for parts in zip(*ranks, strict=True)]
    assert batches == [take(order, 4 * number, 4) for number in range(20)]


def test_it_resumes_to_the_sample() -> None:
    order = MixtureOrder(LENGTHS, WEIGHTS, 0)
    whole = list(islice(PositionSampler(order, start=0, batch_size=6), 10))
    resumed = list(islice(PositionSampler(order, start=12, batch_size=6), 8))
    assert resumed == whole[2:]
    shifted = list(islice(PositionSampler(order, start=13, batch_size=6), 8))  # mutant: off by one sample
    assert shifted != whole[2:]


@pytest.mark.parametrize(("batch_size", "world"), [(0, 1), (3, 2)])
def test_batches_that_cannot_be_divided(batch_size: int, world: int) -> None:
    with pytest.raises(ConfigError, match="cannot be divided among the processes"):
        PositionSampler(Order(3, 0), start=0, batch_size=batch_size, world=world)
