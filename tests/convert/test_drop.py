"""Drop-Upcycling and noise: which neurons are drawn anew, how many, and what the rest looks like."""

from __future__ import annotations

import conversions
import models
import pytest
import torch
from conversions import options

EXPERTS, SHARD = 8, models.WIDTH // 2
STEM = "model.layers.{layer}.mlp.experts.{expert}.{role}_proj.weight"


def changed_neurons(name, dense, tmp_path, **changes):
    """By (layer, expert) the neurons of gate, up and down that differ from an undropped conversion; others must not."""
    init = {"init": "drop", "target": "qwen2_moe", **changes}
    dropped = conversions.run(options(dense(name), tmp_path / "drop", **init))
    kept = conversions.run(options(dense(name), tmp_path / "kept", target="qwen2_moe"))
    new, old = conversions.read_tensors(dropped.directory), conversions.read_tensors(kept.directory)
    found = {}
    for layer in range(models.LAYERS):
        for expert in range(EXPERTS):
            sets = []
            for role in ("gate", "up", "down"):
                key = STEM.format(layer=layer, expert=expert, role=role)
                same = (new[key] == old[key]).movedim(int(role == "down"), 0)  # neurons first
                whole, some = same.all(dim=1), same.any(dim=1)
                assert torch.equal(whole, some)  # a neuron is kept bit for bit, or drawn anew in every weight
                sets.append(frozenset((~whole).nonzero().flatten().tolist()))
            found[layer, expert] = sets
    return found


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("neurons", ["coherent", "independent"])
def test_share_of_neurons_is_the_ratio(ratio, neurons, dense, tmp_path):
    found = changed_neurons("llama", dense, tmp_path, ratio=ratio, neurons=neurons)
    assert {len(chosen) for sets in found.values() for chosen in sets} == {int(SHARD * ratio)}


def test_coherent_takes_one_set_for_all_matrices_of_an_expert(dense, tmp_path):
    found = changed_neurons("llama", dense, tmp_path, neurons="coherent")
    assert all(gate == up == down for gate, up, down in found.values())
    assert len({sets[0] for sets in found.values()}) > EXPERTS  # and another for another expert or layer


def test_independent_takes_one_set_for_each_matrix(dense, tmp_path):
    found = changed_neurons("llama", dense, tmp_path, neurons="independent")
    assert not any(gate == up == down for gate, up, down in found.values())


@pytest.mark.parametrize("name", ["phi3", "llama"])
def test_fused_matrices_drop_the_same_way(name, dense, tmp_path):
    found = changed_neurons(name, dense, tmp_path, neurons="coherent")
    assert all(gate == up == down for gate, up, down in found.values())


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_noise_touches_its_share_of_the_weights(fraction, dense, tmp_path):
    noisy = conversions.run(options(dense("llama"), tmp_path / "noise", init="noise", std=0.1, fraction=fraction))
    kept = conversions.run(options(dense("llama"), tmp_path / "kept"))
    new, old = conversions.read_tensors(noisy.directory), conversions.read_tensors(kept.directory)
    experts = [key for key in old if ".mlp.experts." in key]
    touched = torch.cat([(new[key] != old[key]).flatten() for key in experts]).double().mean()
    assert abs(touched - fraction) < 0.02
    if fraction == 1.0:
        for key in experts:
            assert float((new[key] - old[key]).std()) == pytest.approx(0.1 * float(old[key].std()), rel=0.2)
    assert all(torch.equal(new[key], old[key]) for key in old.keys() - set(experts))
