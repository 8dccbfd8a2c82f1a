"""A dense Nemotron-H as its family's own mixture: what transformers computes, what is stored, what is rejected."""

from __future__ import annotations

import json
import shutil

import conversions
import models
import pytest
import torch
from conversions import assert_lossless, gap, options
from transformers import AutoModelForCausalLM

from upcycle.arch.engines import features
from upcycle.arch.targets import TARGETS
from upcycle.convert.prepare import prepare
from upcycle.models.config import load_config
from upcycle.models.moe import config_features

TOLERANCE = 1e-5  # only the order of sums differs; the largest difference seen is 3e-6
PATTERN, WIDTH, ALONE = "M-*--M-", 64, 16
LAYERS = [layer for layer, kind in enumerate(PATTERN) if kind == "-"]
SHAPES = {
    "E8G8T8": (8, 8, 8),
    "E8G4T8": (8, 4, 8),
    "E4G2T4": (4, 2, 4),
    "E8G1T2": (8, 1, 2),
    "128 of which 6": (64, 2, 6),
    "512 of which 22": (256, 2, 22),
}
LEGACY = {"linear_attention": "mamba", "full_attention": "attention"}


def asked(shape="E8G4T8", **changes):
    expansion, granularity, top_k = SHAPES[shape]
    return {"router_order": "auto", "expansion": expansion, "granularity": granularity, "top_k": top_k, **changes}


def hybrid(**changes):
    shape = {"hybrid_override_pattern": PATTERN, "num_hidden_layers": len(PATTERN), "intermediate_size": WIDTH}
    return models.build("nemotron_h", **shape, **changes)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A hybrid in which some FFNs follow each other, saved by transformers."""
    return models.save(hybrid(), tmp_path_factory.mktemp("hybrid") / "dense")


@pytest.fixture(scope="module")
def bfloat16(tmp_path_factory):
    return models.save(hybrid(), tmp_path_factory.mktemp("hybrid") / "bfloat16", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def expected(source):
    return conversions.outputs(source)


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory):
    """E8G4T8 with some neurons in the shared expert, and a router whose logits differ between groups."""
    output = tmp_path_factory.mktemp("hybrid") / "moe"
    return conversions.run(options(source, output, **asked(shared_neurons=ALONE, router_std=0.02))).directory


@pytest.mark.parametrize("shared", [None, ALONE, "all"])
@pytest.mark.parametrize("std", [0.0005, 0.02])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_computes_what_the_dense_model_computes(shape, std, shared, source, expected, tmp_path):
    done = conversions.run(options(source, tmp_path / "moe", **asked(shape, router_std=std, shared_neurons=shared)))
    assert (done.plan.target, done.plan.moe.router_order, done.plan.losses) == ("nemotron_h", "sigmoid_topk", ())
    assert_lossless(done.directory, expected, TOLERANCE)


@pytest.mark.parametrize(
    "changes", [{"layers": [1]}, {"layers": "every_2"}, {"shared_experts": 3}, {"scaling": "down"}]
)
def test_nor_does_another_request_change_it(changes, source, expected, tmp_path):
    done = conversions.run(options(source, tmp_path / "moe", **asked(**changes)))
    assert (done.plan.target, done.plan.losses) == ("nemotron_h", ())
    assert_lossless(done.directory, expected, TOLERANCE)


@pytest.mark.parametrize("shared", [None, ALONE, "all"])
def test_the_generic_type_computes_it_too(shared, source, expected, tmp_path):
    request = asked(shared_neurons=shared, target="upcycled_moe", router_std=0.02)
    done = conversions.run(options(source, tmp_path / "moe", **request))
    assert done.plan.moe.router_order == "sigmoid_topk"
    assert_lossless(done.directory, expected, TOLERANCE)


@pytest.mark.parametrize("shared", [None, ALONE, "all"])
def test_in_bfloat16_it_is_as_far_off_as_the_dense_model(shared, bfloat16, tmp_path):
    """Against the same weights computed in float32; measured, the mixture is as far off as the dense model is."""

    def computed(directory, dtype):
        with torch.inference_mode():
            return conversions.load(directory, dtype=dtype)(models.token_ids()).logits.float()

    done = conversions.run(options(bfloat16, tmp_path / "moe", **asked(shared_neurons=shared)))
    exact = computed(bfloat16, torch.float32)
    rounding = float((computed(bfloat16, torch.bfloat16) - exact).square().mean().sqrt())
    found = float((computed(done.directory, torch.bfloat16) - exact).square().mean().sqrt())
    assert 0 < found < 1.5 * rounding
    assert_lossless(done.directory, {"logits": exact}, TOLERANCE)


def dense_shard(dense, layer, neurons):
    """Up and down of some neurons, as this test knows them to lie."""
    stem = f"backbone.layers.{layer}.mixer"
    return dense[f"{stem}.up_proj.weight"][neurons], dense[f"{stem}.down_proj.weight"][:, neurons]


@pytest.mark.parametrize("shared", [None, ALONE, "all"])
def test_experts_are_copies_of_shards_byte_for_byte(shared, bfloat16, tmp_path):
    done = conversions.run(options(bfloat16, tmp_path / "moe", **asked(shared_neurons=shared)))
    dense, moe = conversions.read_tensors(bfloat16), conversions.read_tensors(done.directory)
    first, width = (ALONE, (WIDTH - ALONE) // 4) if shared == ALONE else (0, WIDTH // 4)
    for layer in LAYERS:
        stem = f"backbone.layers.{layer}.mixer"
        for expert in range(32):
            start = first + expert % 4 * width
            up, down = dense_shard(dense, layer, slice(start, start + width))
            assert torch.equal(moe[f"{stem}.experts.{expert}.up_proj.weight"], up)
            down = torch.zeros_like(down) if shared == "all" else down
            assert torch.equal(moe[f"{stem}.experts.{expert}.down_proj.weight"], down)
        found = moe[f"{stem}.shared_experts.up_proj.weight"], moe[f"{stem}.shared_experts.down_proj.weight"]
        if shared is None:  # the type has one all the same: it computes 0, and learns
            assert found[0].shape == (1, models.HIDDEN)
            assert found[0].any()
            assert not found[1].any()
        else:
            neurons = dense_shard(dense, layer, slice(0, WIDTH if shared == "all" else ALONE))
            assert all(map(torch.equal, found, neurons))
        bias = moe[f"{stem}.gate.e_score_correction_bias"]
        assert (bias.dtype, bias.shape) == (torch.float32, (32,))
        assert not bias.any()
        assert moe[f"{stem}.gate.weight"].dtype == torch.bfloat16
    kept = {key: tensor for key, tensor in dense.items() if "_proj" not in key or ".in_" in key or ".out_" in key}
    assert all(torch.equal(moe[key], tensor) for key, tensor in kept.items())


def restyled(source, directory, change):
    shutil.copytree(source, directory)
    file = directory / "config.json"
    fields = json.loads(file.read_text())
    change(fields)
    file.write_text(json.dumps(fields))
    return directory


def nvidia(fields):
    del fields["layers_block_type"]
    fields |= {"hybrid_override_pattern": PATTERN, "num_hidden_layers": len(PATTERN)}


def legacy(fields):
    fields["layers_block_type"] = [LEGACY.get(name, name) for name in fields["layers_block_type"]]


def both(fields):
    fields["hybrid_override_pattern"] = PATTERN


@pytest.mark.parametrize("style", [nvidia, legacy, both])
def test_every_style_of_config_is_read_alike(style, source, tmp_path):
    written = []
    for given in (source, restyled(source, tmp_path / "restyled", style)):
        done = conversions.run(options(given, tmp_path / f"moe_{len(written)}", **asked("E4G2T4")))
        written.append([(done.directory / name).read_bytes() for name in ("config.json", "model.safetensors")])
    assert written[0] == written[1]


def test_config_is_written_in_nvidias_style(converted):
    raw = json.loads((converted / "config.json").read_text())
    assert (raw["hybrid_override_pattern"], raw["num_hidden_layers"]) == (PATTERN.replace("-", "E"), len(PATTERN))
    assert not {"layers_block_type", "layer_types", "mtp_layers_block_type", "time_step_limit"} & raw.keys()
    facts = {
        "n_routed_experts": 32,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 12,
        "n_shared_experts": 1,
        "moe_shared_expert_intermediate_size": ALONE,
        "norm_topk_prob": True,
        "routed_scaling_factor": 4.0,
        "n_group": 1,
        "topk_group": 1,
    }
    assert {name: raw[name] for name in facts} == facts


def test_a_limit_of_time_steps_is_kept(source, expected, tmp_path):
    def limit(fields):
        fields["time_step_limit"] = [0.0, 0.5]

    done = conversions.run(options(restyled(source, tmp_path / "dense", limit), tmp_path / "moe", **asked()))
    assert json.loads((done.directory / "config.json").read_text())["time_step_limit"] == [0.0, 0.5]


def test_the_generic_config_is_strict_json(source, tmp_path):
    done = conversions.run(options(source, tmp_path / "moe", **asked(target="upcycled_moe")))

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    json.loads((done.directory / "config.json").read_text(), parse_constant=refuse)
    assert load_config(done.directory).text_config.time_step_limit[1] == float("inf")


def test_experts_that_transformers_writes_of_every_dense_one_are_no_mixture(source, tmp_path):
    assert json.loads((source / "config.json").read_text())["n_routed_experts"] == 8
    assert prepare(options(source, tmp_path / "moe", **asked()), execute=False).plan.target == "nemotron_h"


def test_greedy_tokens_are_the_dense_models(source, converted):
    def generate(directory):
        model, info = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
        assert not any(info.values()), info
        arguments = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 3}
        return model.eval().generate(models.token_ids(), **arguments)

    assert torch.equal(generate(converted), generate(source))


@pytest.mark.parametrize("changes", [{}, {"use_bias": True}, {"use_conv_bias": False}])
def test_its_features_are_the_plans(changes, tmp_path):
    source = models.save(hybrid(**changes), tmp_path / "dense")
    request = options(source, tmp_path / "moe", **asked("E8G1T2", shared_neurons=ALONE))
    conversion = prepare(request, execute=False)
    found = config_features(TARGETS["nemotron_h"], load_config(conversions.run(request).directory), portable=True)
    assert found == features(conversion.source.model, conversion.plan.moe, portable=True)
    assert not found.dense_layers
    assert found.usual_mamba_biases is not bool(changes)


def values(change):
    """A change of the router's tensors, layer by layer."""

    def changed(directory):
        def apply(tensors):
            for layer in LAYERS:
                stem = f"backbone.layers.{layer}.mixer."
                change({name.removeprefix(stem): t for name, t in tensors.items() if name.startswith(stem)})

        conversions.edit(directory, apply)

    return changed


def scaled(directory):
    file = directory / "config.json"
    fields = json.loads(file.read_text())
    file.write_text(json.dumps(fields | {"routed_scaling_factor": 1.05 * fields["routed_scaling_factor"]}))


def noise(count):
    return 0.5 * torch.randn(count, generator=torch.Generator().manual_seed(0))


BIAS, GATE = "gate.e_score_correction_bias", "gate.weight"
MUTANTS = {
    "another scaling factor": scaled,
    "a correction bias of each expert": values(lambda t: t[BIAS].copy_(noise(32))),
    "a correction bias one expert further": values(lambda t: t[BIAS].copy_(noise(8).repeat_interleave(4).roll(1))),
    "equal router rows for equal shards": values(
        lambda t: t[GATE].copy_(t[GATE].unflatten(0, (8, 4)).transpose(0, 1).flatten(0, 1))
    ),
    "a column of the router for the correction bias": values(lambda t: t[BIAS].copy_(t[GATE].roll(1, 0)[:, 0] * 10)),
    "the shared part twice": values(lambda t: t["shared_experts.down_proj.weight"].mul_(2)),
    "no shared part": values(lambda t: t["shared_experts.down_proj.weight"].zero_()),
    "a shard in the place of another": values(
        lambda t: t["experts.0.down_proj.weight"].copy_(t["experts.1.down_proj.weight"].clone())
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutant_is_rejected(mutant, converted, expected, tmp_path):
    directory = shutil.copytree(converted, tmp_path / "mutant")
    MUTANTS[mutant](directory)
    with pytest.raises(AssertionError, match="differs by"):
        assert_lossless(directory, expected, TOLERANCE)


def test_a_correction_bias_of_each_group_changes_nothing(converted, expected, tmp_path):
    """So what the mutants show is that groups are torn, and not that there is a bias."""
    directory = shutil.copytree(converted, tmp_path / "moe")
    values(lambda t: t[BIAS].copy_(noise(8).repeat_interleave(4)))(directory)
    assert gap(directory, expected) <= TOLERANCE
