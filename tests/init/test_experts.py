"""The functions that make experts and routers, against closed forms."""

from __future__ import annotations

import pytest
import torch

from upcycle.init.experts import add_noise, drop_neurons, normal
from upcycle.init.rng import generator


def test_new_neurons_have_mean_and_deviation_of_those_they_replace():
    w_OI = torch.cat([torch.randn(400, 300, generator=generator(0, "w")) * 0.3 + 2.0, torch.zeros(400, 300)], dim=1)
    made = drop_neurons(w_OI, neuron_axis=1, ratio=0.5, neurons=generator(0, "n"), values=generator(0, "v"))
    chosen = torch.randperm(600, generator=generator(0, "n"))[:300]
    assert made[:, chosen].mean() == pytest.approx(float(w_OI[:, chosen].mean()), rel=0.02)
    assert made[:, chosen].std() == pytest.approx(float(w_OI[:, chosen].std()), rel=0.02)
    kept = torch.ones(600, dtype=torch.bool).index_fill(0, chosen, False)
    assert torch.equal(made[:, kept], w_OI[:, kept])


@pytest.mark.parametrize("axis", [0, 1])
def test_the_source_is_not_changed(axis):
    w_OI = torch.randn(4, 6)
    before = w_OI.clone()
    drop_neurons(w_OI, neuron_axis=axis, ratio=0.5, neurons=generator(0, "n"), values=generator(0, "v"))
    add_noise(w_OI, std=1.0, fraction=0.5, values=generator(0, "v"))
    assert torch.equal(w_OI, before)


def test_repeated_rows_stand_together():
    rows = normal(12, 8, std=0.5, repeat=4, values=generator(3, "router"))
    drawn = normal(3, 8, std=0.5, repeat=1, values=generator(3, "router"))
    assert torch.equal(rows.view(3, 4, 8), drawn[:, None].expand(3, 4, 8))
    assert normal(1000, 100, std=0.02, repeat=1, values=generator(0, "x")).std() == pytest.approx(0.02, rel=0.01)
