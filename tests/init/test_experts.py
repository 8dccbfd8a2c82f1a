"""The functions that make experts and routers, against closed forms."""

from __future__ import annotations

import pytest
import torch

from upcycle.init.experts import ELEMENTS_AT_ONCE, add_noise, drop_neurons, normal, row_blocks
from upcycle.init.rng import generator


def whole(blocks):
    return torch.cat(list(blocks))


def test_new_neurons_have_mean_and_deviation_of_those_they_replace():
    w_OI = torch.cat([torch.randn(400, 300, generator=generator(0, "w")) * 0.3 + 2.0, torch.zeros(400, 300)], dim=1)
    made = whole(drop_neurons(w_OI, neuron_axis=1, ratio=0.5, neurons=generator(0, "n"), values=generator(0, "v")))
    chosen = torch.randperm(600, generator=generator(0, "n"))[:300]
    assert made[:, chosen].mean() == pytest.approx(float(w_OI[:, chosen].mean()), rel=0.02)
    assert made[:, chosen].std() == pytest.approx(float(w_OI[:, chosen].std()), rel=0.02)
    kept = torch.ones(600, dtype=torch.bool).index_fill(0, chosen, False)
    assert torch.equal(made[:, kept], w_OI[:, kept])


@pytest.mark.parametrize("axis", [0, 1])
def test_the_source_is_not_changed(axis):
    w_OI = torch.randn(4, 6)
    before = w_OI.clone()
    whole(drop_neurons(w_OI, neuron_axis=axis, ratio=0.5, neurons=generator(0, "n"), values=generator(0, "v")))
    whole(add_noise(w_OI, std=1.0, fraction=0.5, values=generator(0, "v")))
    assert torch.equal(w_OI, before)


def test_repeated_rows_stand_together():
    rows = whole(normal(12, 8, std=0.5, repeat=4, values=generator(3, "router")))
    drawn = whole(normal(3, 8, std=0.5, repeat=1, values=generator(3, "router")))
    assert torch.equal(rows.view(3, 4, 8), drawn[:, None].expand(3, 4, 8))
    many = whole(normal(1000, 100, std=0.02, repeat=1, values=generator(0, "x")))
    assert many.std() == pytest.approx(0.02, rel=0.01)


@pytest.mark.parametrize("shape", [(5000, 700), (3, 2**21), (7,), (0, 4), (4, 0)])
def test_row_blocks_are_all_rows_in_order_and_small(shape):
    w_OI = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)
    blocks = row_blocks(w_OI)
    assert sum(block.numel() for block in blocks) == w_OI.numel()
    assert not blocks or torch.equal(whole(blocks), w_OI)
    assert all(block.numel() <= max(ELEMENTS_AT_ONCE, w_OI[:1].numel()) for block in blocks)


@pytest.mark.parametrize("axis", [0, 1])
def test_matrices_larger_than_a_block(axis):
    w_OI = torch.randn(1500, 1000, generator=generator(0, "w"))
    made = whole(drop_neurons(w_OI, neuron_axis=axis, ratio=0.3, neurons=generator(0, "n"), values=generator(0, "v")))
    changed = (made != w_OI).any(1 - axis)
    assert int(changed.sum()) == int(0.3 * w_OI.shape[axis])
    noisy = whole(add_noise(w_OI, std=0.5, fraction=0.25, values=generator(0, "v")))
    difference = noisy - w_OI
    assert float((difference != 0).float().mean()) == pytest.approx(0.25, rel=0.02)
    assert float(difference[difference != 0].std()) == pytest.approx(0.5 * float(w_OI.std()), rel=0.02)
