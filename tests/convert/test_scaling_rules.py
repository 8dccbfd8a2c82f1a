"""Every rule of `init.scaling` in whole checkpoints; the arithmetic alone is in tests/plan/test_scaling.py."""

from __future__ import annotations

import math
import shutil

import conversions
import models
import pytest
import torch
from conversions import ROUTER_ORDERS, TOLERANCE, assert_lossless, gap, options

from upcycle.errors import SourceError
from upcycle.models.source import open_source
from upcycle.models.text import sample_tokens

EXPANSION, GRANULARITY, TOP_K = 4, 2, 2
SHARD = models.WIDTH // GRANULARITY
NEEDED = {"softmax_topk": EXPANSION * GRANULARITY**2 / TOP_K, "topk_softmax": float(GRANULARITY)}
WIDE = 0.05  # a router std at which groups are far from equally likely


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory):
    """A Llama and a GPT-2 with tokenizers, for what measures on text."""

    def saved(name):
        directory = models.save(models.build(name), tmp_path_factory.mktemp("text") / name)
        models.tokenizer().save_pretrained(directory)
        return directory

    return {name: saved(name) for name in ("llama", "gpt2")}


@pytest.mark.parametrize("order", ROUTER_ORDERS)
@pytest.mark.parametrize("name", ["nemotron", "nemotron_biases"])
def test_paper_is_exact_for_squared_relu(name, order, dense, dense_outputs, tmp_path):
    done = conversions.run(options(dense(name), tmp_path / "moe", scaling="paper", router_order=order))
    assert done.plan.losses == ()
    source, moe = conversions.read_tensors(dense(name)), conversions.read_tensors(done.directory)
    root = NEEDED[order] ** (1 / 3)
    for layer in range(models.LAYERS):
        stem = f"model.layers.{layer}.mlp"
        for expert in range(EXPANSION * GRANULARITY):
            shard = slice(expert % GRANULARITY * SHARD, (expert % GRANULARITY + 1) * SHARD)
            up, down = (moe[f"language_model.{stem}.experts.{role}_proj"][expert] for role in ("up", "down"))
            torch.testing.assert_close(up, source[f"{stem}.up_proj.weight"][shard] * root, rtol=2e-7, atol=0)
            torch.testing.assert_close(down, source[f"{stem}.down_proj.weight"][:, shard] * root, rtol=2e-7, atol=0)
    assert_lossless(done.directory, dense_outputs(name), TOLERANCE[order])


@pytest.mark.parametrize("order", ROUTER_ORDERS)
@pytest.mark.parametrize("name", ["llama", "gemma", "gpt2"])
def test_paper_differs_elsewhere_and_says_so(name, order, dense, dense_outputs, tmp_path):
    done = conversions.run(options(dense(name), tmp_path / "moe", scaling="paper", router_order=order))
    assert any("init.scaling=paper" in line for line in done.plan.losses)
    assert gap(done.directory, dense_outputs(name)) > 0.1


@pytest.mark.parametrize("order", ROUTER_ORDERS)
def test_paper_multiplies_every_matrix_of_swiglu(order, dense, tmp_path):
    done = conversions.run(options(dense("llama"), tmp_path / "moe", scaling="paper", router_order=order))
    factors = {"gate", "up", "down"}
    root = NEEDED[order] ** (1 / 3)
    for scaling in done.plan.scaling.values():
        assert {role: scaling.matrix[role] for role in factors} == pytest.approx(dict.fromkeys(factors, root))


@pytest.mark.parametrize("order", ROUTER_ORDERS)
@pytest.mark.parametrize("name", ["llama_biases", "gemma", "gpt2", "nemotron_biases"])
def test_down_is_exact_for_every_activation(name, order, dense, dense_outputs, tmp_path):
    """With biases and a shared expert where the model has them; mutants forget the rule of either."""
    asked = {"scaling": "down", "shared_experts": 1, "router_order": order, "target": "upcycled_moe"}
    done = conversions.run(options(dense(name), tmp_path / "moe", **asked))
    assert done.plan.losses == ()
    assert {scaling.matrix["up"] for scaling in done.plan.scaling.values()} == {1.0}
    assert {scaling.matrix["down"] for scaling in done.plan.scaling.values()} == {NEEDED[order]}
    assert_lossless(done.directory, dense_outputs(name), TOLERANCE[order])
    before = conversions.read_tensors(done.directory)
    mutated = [end for end in MUTATED_BY_DOWN if any(key.endswith(end) for key in before)]
    assert len(mutated) == (1 if name == "gemma" else 2)
    for end in mutated:
        conversions.edit(done.directory, lambda tensors, end=end: scale(tensors, end, 1.5))
        with pytest.raises(AssertionError, match="differs by"):
            assert_lossless(done.directory, dense_outputs(name), TOLERANCE[order])
        conversions.edit(done.directory, lambda tensors: tensors.update(before))


MUTATED_BY_DOWN = ("experts.down_proj", "experts.down_proj_bias")


def scale(tensors, end, factor):
    for name in tensors:
        if name.endswith(end):
            tensors[name] *= factor


@pytest.mark.parametrize("number", [8, 8.0])
def test_the_right_number_is_lossless(number, dense, dense_outputs, tmp_path):
    """A whole number is a factor too (found by this test: it was taken for `exact`)."""
    done = conversions.run(options(dense("llama"), tmp_path / "moe", scaling=number))
    assert done.plan.losses == ()
    assert_lossless(done.directory, dense_outputs("llama"), TOLERANCE["softmax_topk"])


@pytest.mark.parametrize("number", [4, 4.0, 0.5])
def test_another_number_is_the_factor_of_the_output(number, dense, dense_outputs, tmp_path):
    done = conversions.run(options(dense("llama"), tmp_path / "moe", scaling=number))
    assert [scaling.output for scaling in done.plan.scaling.values()] == [number] * models.LAYERS
    assert done.plan.losses
    assert gap(done.directory, dense_outputs("llama")) > 0.1


def ffn_outputs(directory, ids):
    """What goes into and comes out of the first layer's FFN."""
    model, seen = conversions.load(directory), {}
    module = next(module for path, module in model.named_modules() if path.endswith(".0.mlp"))
    module.register_forward_hook(lambda _module, inputs, output: seen.update(x=inputs[0], y=output))
    with torch.inference_mode():
        model(ids[None])
    return seen["x"][0], seen["y"][0]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_calibrated_factor_is_granularity_by_measured_mass(name, with_tokenizer, tmp_path):
    changes = {"scaling": "calibrated", "router_std": WIDE, "target": "upcycled_moe"}
    done = conversions.run(options(with_tokenizer[name], tmp_path / "moe", **changes))
    ids = sample_tokens(open_source(str(with_tokenizer[name])), tokens=64)
    x_SH, _ = ffn_outputs(with_tokenizer[name], ids)
    tensors = conversions.read_tensors(done.directory)
    router_NH = next(tensor for key, tensor in tensors.items() if key.endswith("0.mlp.gate.weight"))
    mass = (x_SH @ router_NH.T).softmax(-1).topk(TOP_K).values.sum(-1).mean()
    assert mass > 1.1 / EXPANSION  # far from what `exact` expects
    assert done.plan.scaling[0].output == pytest.approx(GRANULARITY / float(mass), rel=1e-5)
    assert done.plan.scaling[0].output != done.plan.scaling[1].output


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_calibrated_brings_the_ffn_closer_than_exact(name, with_tokenizer, tmp_path):
    ids = sample_tokens(open_source(str(with_tokenizer[name])), tokens=64)
    _, dense_y = ffn_outputs(with_tokenizer[name], ids)
    errors = {}
    for rule in ("exact", "calibrated"):
        done = conversions.run(options(with_tokenizer[name], tmp_path / rule, scaling=rule, router_std=WIDE))
        errors[rule] = float((ffn_outputs(done.directory, ids)[1] - dense_y).square().mean())
    assert errors["calibrated"] < 0.8 * errors["exact"]


def test_calibration_takes_more_tokens_than_the_model_has_positions(with_tokenizer, tmp_path):
    """Learned positions end at 64 (found by this test: an index error)."""
    changes = {"scaling": "calibrated", "calibration_tokens": 5 * models.POSITIONS // 2}
    done = conversions.run(options(with_tokenizer["gpt2"], tmp_path / "moe", **changes))
    assert all(math.isclose(s.output, NEEDED["softmax_topk"], rel_tol=1e-3) for s in done.plan.scaling.values())


def test_a_mass_that_cannot_be_measured(with_tokenizer, tmp_path):
    """Weights that are finite, and make inputs that are not."""
    source = shutil.copytree(with_tokenizer["llama"], tmp_path / "source")
    conversions.edit(source, lambda t: t["model.layers.1.post_attention_layernorm.weight"].fill_(3e38))
    with pytest.raises(SourceError, match=r"cannot be measured(.|\n)*nan in layer 1\n(.|\n)*init.scaling=exact"):
        conversions.run(options(source, tmp_path / "moe", scaling="calibrated"))
    assert not (tmp_path / "moe").exists()


def test_calibrated_is_exact_where_weights_are_normalised(dense, dense_outputs, tmp_path):
    """TopK-then-softmax has nothing to measure, so no tokenizer is needed."""
    done = conversions.run(options(dense("llama"), tmp_path / "moe", scaling="calibrated", router_order="topk_softmax"))
    assert_lossless(done.directory, dense_outputs("llama"), TOLERANCE["topk_softmax"])
