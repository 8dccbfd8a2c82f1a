"""Routed experts in fewer dimensions: lossless where they start exact, and as close as measured where they do not."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import conversions
import models
import pytest
import torch
from conversions import TOLERANCE, assert_lossless, gap, options, planned

from upcycle.convert.latents import WINDOW, strongest_first
from upcycle.convert.prepare import prepare
from upcycle.errors import ConfigError, SourceError
from upcycle.models import text
from upcycle.models.load import ffn_modules, load_dense
from upcycle.models.source import open_source
from upcycle.models.text import sample_tokens
from upcycle.plan.coverage import check_coverage
from upcycle.plan.parts import Pick, Projected

LATENT = models.HIDDEN // 2
TOKENS = 4 * models.HIDDEN
# A usual router, under which selected experts have all weights; with fc2 = 0 it cannot matter.
EXACT = {"latent": LATENT, "router_std": 0.02}
COMPRESS = {"latent": LATENT, "latent_start": "compress", "calibration_tokens": TOKENS, "router_order": "topk_softmax"}


@pytest.fixture(scope="module")
def speaking(tmp_path_factory):
    """Returns the checkpoint of a model of the table that has a tokenizer."""
    root, made = tmp_path_factory.mktemp("speaking"), {}

    def checkpoint(name):
        if name not in made:
            made[name] = models.save(models.build(name), root / name)
            models.tokenizer().save_pretrained(made[name])
        return made[name]

    return checkpoint


def ordered(name, changes):
    """Hybrids have sigmoids."""
    hybrid = models.MODELS[name]["model_type"] == "nemotron_h"
    return {**changes, "router_order": "sigmoid_topk"} if hybrid else changes


@pytest.mark.parametrize("name", [*models.ONE_PER_FAMILY, "llama_biases", "nemotron_h_runs"])
def test_exact_is_the_dense_model_bit_for_bit(name, dense, dense_outputs, tmp_path):
    for target in ("auto", "upcycled_moe"):
        done = conversions.run(options(dense(name), tmp_path / target, target=target, **ordered(name, EXACT)))
        assert done.plan.losses == ()
        fused = models.MODELS[name]["model_type"] == "phi3"  # one product for gate and up, here two
        assert_lossless(done.directory, dense_outputs(name), 2e-6 if fused else 0.0)


def test_a_hybrid_is_its_own_latent_mixture(dense, tmp_path):
    done = conversions.run(options(dense("nemotron_h"), tmp_path / "moe", router_order="sigmoid_topk", **EXACT))
    assert (done.plan.target, done.plan.config["moe_latent_size"]) == ("nemotron_h", LATENT)
    tensors = conversions.read_tensors(done.directory)
    mixer = "backbone.layers.1.mixer."
    assert tensors[f"{mixer}fc1_latent_proj.weight"].shape == (LATENT, models.HIDDEN)
    assert tensors[f"{mixer}fc2_latent_proj.weight"].shape == (models.HIDDEN, LATENT)
    assert tensors[f"{mixer}experts.0.up_proj.weight"].shape == (models.WIDTH // 2, LATENT)
    assert tensors[f"{mixer}experts.0.down_proj.weight"].shape == (LATENT, models.WIDTH // 2)


@pytest.mark.parametrize("start", ["exact", "compress"])
@pytest.mark.parametrize(
    "changes", [{}, {"shared_experts": 1}, {"shared_neurons": 12}, {"init": "copy", "groups": "positions"}]
)
@pytest.mark.parametrize("name", ["llama_biases", "gpt2", "nemotron_h"])
def test_the_hidden_size_as_latent_size_is_the_identity(name, changes, start, dense, dense_outputs, tmp_path):
    asked = {"latent": models.HIDDEN, "latent_start": start, "router_order": "topk_softmax", **changes}
    if changes.get("groups"):
        asked["target"] = "upcycled_moe"
    done = conversions.run(options(dense(name), tmp_path / "moe", **asked))
    assert done.plan.losses == ()
    assert_lossless(done.directory, dense_outputs(name), TOLERANCE["topk_softmax"])


def test_calibrated_and_drawn_projections_are_both_exact(speaking, dense_outputs, tmp_path):
    asked = {**EXACT, "calibration_tokens": TOKENS}
    drawn = conversions.run(options(speaking("llama"), tmp_path / "drawn", **asked))
    measured = conversions.run(options(speaking("llama"), tmp_path / "measured", scaling="calibrated", **asked))
    for done in (drawn, measured):
        assert_lossless(done.directory, dense_outputs("llama"), 0.0)
    name = "language_model.model.layers.0.mlp.fc1_latent_proj.weight"
    one, other = (conversions.read_tensors(done.directory)[name].double() for done in (drawn, measured))
    assert not torch.allclose(one, other)
    for fc1 in (one, other):
        torch.testing.assert_close(fc1 @ fc1.T, torch.eye(LATENT, dtype=torch.float64), rtol=0, atol=1e-6)


def test_experts_are_shards_between_the_projections(speaking, tmp_path):
    """fc2 E(fc1 x) of all experts of a group is the routed FFN as far as the latents hold it: here, with L = F / G."""
    done = conversions.run(
        options(speaking("gpt2"), tmp_path / "moe", shared_neurons=models.WIDTH - LATENT, **COMPRESS)
    )
    assert done.plan.losses
    assert max(done.plan.latents.errors.values()) < 1e-5  # 16 neurons of one matrix read, and write, 16 dimensions
    assert_lossless(done.directory, conversions.outputs(speaking("gpt2")), TOLERANCE["topk_softmax"])


@pytest.mark.parametrize(
    "changes",
    [
        {"init": "random", "scaling": "none", "shared_neurons": 8},
        {"init": "random", "scaling": "none", "shared_experts": 1},
        {"init": "drop", **COMPRESS},
        {"init": "noise", **COMPRESS, "shared_neurons": 8},
        {**COMPRESS, "shared_neurons": 8, "dtype": "bfloat16"},
    ],
)
def test_other_initializations_load_and_say_what_they_lose(changes, speaking, tmp_path):
    """With biases, of which the shared expert's is of the hidden size and the routed ones' of the latent size."""
    done = conversions.run(options(speaking("nemotron_biases"), tmp_path / "moe", **{"latent": LATENT, **changes}))
    conversions.load(done.directory)
    assert done.plan.losses
    tensors, block = conversions.read_tensors(done.directory), "language_model.model.layers.0.mlp."
    assert tensors[f"{block}experts.down_proj_bias"].shape == (8, LATENT)
    if done.plan.moe.shared_width:
        assert tensors[f"{block}shared_expert.down_proj.bias"].shape == (models.HIDDEN,)


FAMILIES = ["llama", "llama_biases", "gpt2", "phi3", "nemotron_biases", "nemotron_h", "gemma3"]


@pytest.mark.parametrize("shared", [None, 4])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_measured_error_is_that_of_the_written_experts(name, shared, speaking, tmp_path):
    """Each MoE block on the inputs of the dense FFN, on the text that the error was measured on."""
    source = speaking(name)
    done = conversions.run(options(source, tmp_path / "moe", shared_neurons=shared, **ordered(name, COMPRESS)))
    opened = open_source(str(source))
    dense, moe, path = load_dense(opened), conversions.load(done.directory), opened.model.ffn_module()
    prefix = "" if done.plan.target == "nemotron_h" else "language_model."
    blocks = ffn_modules(moe, prefix + path, done.plan.moe.layers)
    wrong, whole = dict.fromkeys(blocks, 0.0), dict.fromkeys(blocks, 0.0)

    def compare(layer, x, y):
        wrong[layer] += float((blocks[layer](x) - y).double().square().sum())
        whole[layer] += float(y.double().square().sum())

    for layer, module in ffn_modules(dense, path, blocks).items():
        module.register_forward_hook(lambda _module, args, output, layer=layer: compare(layer, args[0], output))
    ids = sample_tokens(opened, tokens=TOKENS)
    with torch.inference_mode():
        for part in ids.split(min(WINDOW, opened.model.sizes["P"])):
            dense(input_ids=part[None])
    found = {layer: (wrong[layer] / whole[layer]) ** 0.5 for layer in blocks}
    assert found == pytest.approx(dict(done.plan.latents.errors), rel=1e-3, abs=1e-6)
    assert min(found.values()) > 0.01


@pytest.mark.parametrize("name", ["llama", "gpt2", "nemotron_h"])
def test_the_error_falls_with_latent_size_and_shared_neurons(name, speaking):
    def error(latent, shared):
        asked = ordered(name, {**COMPRESS, "latent": latent, "shared_neurons": shared})
        errors = prepare(options(speaking(name), "moe", **asked), execute=True).plan.latents.errors
        return sum(errors.values()) / len(errors)

    # Neurons of one matrix fit into as many dimensions: beyond, there is nothing left to fall.
    assert error(4, None) > error(8, None) > error(16, None) > error(24, None)
    assert error(4, None) > error(4, 4) > error(4, 12)
    assert error(31, None) < 0.1


def test_strongest_first():
    assert strongest_first(torch.tensor([1.0, 5.0, 2.0, 5.0]), 2) == (1, 3, 0, 2)
    assert strongest_first(torch.tensor([1.0, 5.0, 2.0, 5.0]), 0) == (0, 1, 2, 3)


def test_the_manifest_says_what_was_computed(speaking, tmp_path):
    done = conversions.run(options(speaking("llama"), tmp_path / "moe", shared_neurons=8, **COMPRESS))
    manifest = json.loads((done.directory / "upcycle_manifest.json").read_text())
    latent = manifest["latent"]
    assert set(latent["sha256"]) == {f"layer.{i}.latent.{b}" for i in (0, 1) for b in ("encode", "decode", "output")}
    assert all(len(neurons) == 8 for neurons in latent["shared_neurons"].values())
    assert latent["errors"] == {str(layer): error for layer, error in done.plan.latents.errors.items()}
    assert "relative error" in manifest["losses"][0]
    said = manifest["tensors"]["language_model.model.layers.0.mlp.experts.down_proj"]
    assert "projected to 16 outputs by [layer.0.latent.output]" in said
    assert manifest["losses"][0] in (done.directory / "README.md").read_text()


def test_a_plan_that_does_not_run_says_that_it_will_be_measured(speaking):
    conversion = prepare(options(speaking("llama"), "moe", **COMPRESS), execute=False)
    assert "convert measures the error" in conversion.plan.losses[0]
    without = prepare(options(speaking("llama"), "moe"), execute=False)
    matrices = 3 * 4 * models.LAYERS * models.HIDDEN * LATENT
    assert conversion.cost.peak_memory - without.cost.peak_memory == matrices


def test_processes_and_parts_write_the_same_bytes(speaking, tmp_path):
    asked = {**COMPRESS, "shared_neurons": 8, "max_shard_size": "30KB"}

    def written(output, **changes):
        request = options(speaking("llama"), tmp_path / output, **asked, **changes)
        directory = conversions.convert(request, on_plan=lambda _conversion, _bytes: lambda _count: None)
        return directory and {file.name: file.read_bytes() for file in directory.glob("*.safetensors")}

    one = written("one")
    assert one == written("two", workers=2)
    assert written("parts", part="1/2") is None
    assert written("parts", part="2/2") == one


# Mutants: each must be rejected.


def projections(tensors, change):
    """The tensors with every projected part changed."""
    return [
        replace(t, parts=tuple(change(p) if isinstance(p, Projected) else p for p in t.parts)) if t.parts else t
        for t in tensors
    ]


def test_a_basis_on_the_wrong_side_is_rejected():
    model = conversions.described("llama", intermediate_size=48)
    plan = planned(model, latent=LATENT, latent_start="compress", target="upcycled_moe")
    check_coverage(plan.tensors, model.tensors(), dropped=plan.dropped)
    for wrong in ("input", "output"):
        mutated = projections(plan.tensors, lambda part, wrong=wrong: replace(part, side=wrong))
        with pytest.raises(AssertionError, match="elements produced"):
            check_coverage(mutated, model.tensors(), dropped=plan.dropped)


def test_neurons_of_the_shared_expert_that_are_routed_too_are_rejected(speaking):
    conversion = prepare(options(speaking("llama"), "moe", shared_neurons=8, **COMPRESS), execute=True)
    plan, source = conversion.plan, conversion.source.model.tensors()
    check_coverage(plan.tensors, source, dropped=plan.dropped)
    shared = plan.latents.neurons[0][:8]

    def twice(part):
        base = part.base
        return replace(part, base=replace(base, neurons=shared)) if len(base.neurons) == len(shared) else part

    mutated = projections(plan.tensors, twice)
    assert mutated != list(plan.tensors)
    with pytest.raises(AssertionError, match="not taken over exactly"):
        check_coverage(mutated, source, dropped=plan.dropped)


def test_a_neuron_that_nobody_takes_is_rejected(speaking):
    conversion = prepare(options(speaking("gpt2"), "moe", shared_neurons=8, **COMPRESS), execute=True)
    plan, source = conversion.plan, conversion.source.model.tensors()

    def lost(part):
        first, *rest = part.neurons
        return replace(part, neurons=(*rest, rest[0]))

    mutated = [replace(t, parts=tuple(lost(p) if isinstance(p, Pick) else p for p in t.parts)) for t in plan.tensors]
    with pytest.raises(AssertionError, match="not taken over exactly"):
        check_coverage(mutated, source, dropped=plan.dropped)


def output_basis_in_place_of_zeros(tensors):
    for name in tensors:
        if name.endswith("fc2_latent_proj.weight"):
            tensors[name] = torch.linalg.qr(torch.randn(tensors[name].shape))[0]


def shared_expert_counted_twice(tensors):
    for name in tensors:
        if "shared_expert" in name and name.endswith("down_proj.weight"):
            tensors[name] *= 2


@pytest.mark.parametrize("mutant", [output_basis_in_place_of_zeros, shared_expert_counted_twice])
@pytest.mark.parametrize("name", ["llama", "nemotron_h"])
def test_a_start_that_counts_something_twice_is_rejected(name, mutant, dense, dense_outputs, tmp_path):
    done = conversions.run(options(dense(name), tmp_path / "moe", **ordered(name, EXACT)))
    conversions.edit(done.directory, mutant)
    with pytest.raises(AssertionError, match="differs by"):
        assert_lossless(done.directory, dense_outputs(name), 0.01)


@pytest.mark.parametrize("matrix", ["fc1", "fc2"])
def test_compressed_projections_matter(matrix, speaking, tmp_path):
    """The mutant of a basis on the wrong side that shapes do not show: latents in another order."""
    changes = {**COMPRESS, "shared_neurons": models.WIDTH - LATENT}
    done = conversions.run(options(speaking("gpt2"), tmp_path / "moe", **changes))
    dense = conversions.outputs(speaking("gpt2"))
    assert_lossless(done.directory, dense, TOLERANCE["topk_softmax"])

    def rolled(tensors):
        for name in tensors:
            if f"{matrix}_latent_proj" in name:
                tensors[name] = tensors[name].roll(1, dims=0 if matrix == "fc1" else 1)

    conversions.edit(done.directory, rolled)
    assert gap(done.directory, dense) > 0.1


# Bad input.


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"latent": models.HIDDEN + 1}, r"moe.latent is out of range\n +found: +33\n +expected: 1 to 32"),
        ({"latent": 0}, "moe.latent is out of range"),
        ({"latent_start": "compress"}, r"for a moe.latent below(.|\n)*moe.latent=null(.|\n)*set moe.latent=16"),
        ({"latent": 8, "latent_start": "exakt"}, r"init.latent\n +found: +exakt(.|\n)*did you mean exact"),
        ({"latent": 8, "shared_neurons": 8}, r"the whole FFN(.|\n)*shared_neurons=8(.|\n)*init.latent=compress"),
        ({"latent": 8, "shared_experts": 1}, r"the whole FFN(.|\n)*shared_experts=1(.|\n)*init.latent=compress"),
        ({**COMPRESS, "shared_neurons": "all"}, r"takes neurons of the FFN(.|\n)*=all(.|\n)*init.latent=exact"),
        ({**COMPRESS, "shared_experts": 1}, r"takes neurons of the FFN(.|\n)*shared_experts=1"),
        ({**COMPRESS, "init": "random"}, r"what init=random draws anew(.|\n)*leave init.latent out"),
        ({**COMPRESS, "calibration_tokens": 100}, r"too small to measure(.|\n)*100(.|\n)*calibration_tokens=128"),
    ],
)
def test_refused(changes, said, speaking, tmp_path):
    with pytest.raises(ConfigError, match=said):
        conversions.run(options(speaking("llama"), tmp_path / "moe", **changes))
    assert not (tmp_path / "moe").exists()


def test_more_text_than_there_is_is_refused(speaking, tmp_path, monkeypatch):
    library = tmp_path / "library"
    library.mkdir()
    for name in ("abc", "argparse", "bisect"):
        (library / f"{name}.py").write_text("def parse(self, argument): return argument\n")
    monkeypatch.setattr(text, "DEFAULT_TEXT", library / "argparse.py")
    with pytest.raises(ConfigError, match=r"asks for more text than there is\n +found: +1000\n +expected: at most"):
        conversions.run(options(speaking("llama"), tmp_path / "moe", **COMPRESS | {"calibration_tokens": 1000}))


def test_a_type_without_latents_is_refused(dense, tmp_path):
    with pytest.raises(Exception, match=r"qwen2_moe cannot express(.|\n)*moe.latent is 16, it can express null"):
        conversions.run(options(dense("llama"), tmp_path / "moe", target="qwen2_moe", **EXACT))


def test_inputs_that_are_not_finite_are_refused(speaking, tmp_path):
    source = shutil.copytree(speaking("llama"), tmp_path / "source")
    conversions.edit(source, lambda t: t["model.layers.1.post_attention_layernorm.weight"].fill_(3e38))
    with pytest.raises(SourceError, match=r"not finite in layer 1(.|\n)*init.latent=exact"):
        conversions.run(options(source, tmp_path / "moe", **COMPRESS))
    assert not (tmp_path / "moe").exists()
