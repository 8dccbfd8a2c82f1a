"""A new block for multi-token prediction: its published names, what tells of it, and what it leaves alone."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import conversions
import models
import pytest
import torch
from conversions import options
from safetensors.torch import save_file

from upcycle.arch.families import FAMILIES
from upcycle.arch.family import describe
from upcycle.convert.prepare import prepare
from upcycle.convert.render import plan_json, plan_table
from upcycle.errors import ConfigError, TargetError
from upcycle.models.ahead import attach, load_block
from upcycle.models.config import load_config
from upcycle.models.moe import describe_moe
from upcycle.verify.stored import stored_sizes

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from upcycle.options.config import ConvertConfig

ASKED = {"router_order": "auto", "expansion": 4, "granularity": 2, "top_k": 4, "router_std": 0.02}
HIDDEN = models.HIDDEN
ATTENTION, MOE = "backbone.layers.2.", "backbone.layers.3."


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save(models.build("nemotron_h"), tmp_path_factory.mktemp("ahead") / "dense", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Outputs by what was asked for."""
    root = tmp_path_factory.mktemp("made")
    return {
        mtp: conversions.run(options(source, root / mtp, mtp=mtp, **ASKED)).directory
        for mtp in ("none", "copy", "random")
    }


def block_of(directory: Path) -> dict[str, Tensor]:
    return {name: each for name, each in conversions.read_tensors(directory).items() if name.startswith("mtp.")}


@pytest.mark.parametrize("mtp", ["copy", "random"])
def test_names_and_shapes_are_those_that_config_json_tells_of(mtp: str, made: dict[str, Path]) -> None:
    raw = json.loads((made[mtp] / "config.json").read_text())
    assert (raw["num_nextn_predict_layers"], raw["mtp_hybrid_override_pattern"]) == (1, "*E")
    told = describe(FAMILIES["nemotron_h"], load_config(made[mtp])).ahead_shapes()
    found = block_of(made[mtp])
    assert {name: tuple(each.shape) for name, each in found.items()} == told
    assert "mtp.layers.1.mixer.experts.7.up_proj.weight" in found
    dtypes = {name: torch.float32 if name.endswith("correction_bias") else torch.bfloat16 for name in found}
    assert {name: each.dtype for name, each in found.items()} == dtypes
    assert json.loads((made["none"] / "config.json").read_text())["num_nextn_predict_layers"] == 0


def test_a_copy_is_the_last_layers_byte_for_byte(made: dict[str, Path]) -> None:
    tensors = conversions.read_tensors(made["copy"])
    copied = {
        **{f"mtp.layers.0.{name.removeprefix(ATTENTION)}": name for name in tensors if name.startswith(ATTENTION)},
        **{f"mtp.layers.1.{name.removeprefix(MOE)}": name for name in tensors if name.startswith(MOE)},
        "mtp.layers.1.final_layernorm.weight": "backbone.norm_f.weight",
    }
    assert all(torch.equal(tensors[name], tensors[own]) for name, own in copied.items())
    embedding_half, hidden_half = tensors["mtp.layers.0.eh_proj.weight"].float().chunk(2, dim=1)
    assert not embedding_half.any()
    assert torch.equal(hidden_half, torch.eye(HIDDEN))
    entrance = {f"mtp.layers.0.{name}.weight" for name in ("enorm", "hnorm", "eh_proj")}
    assert all(bool((tensors[name] == 1).all()) for name in entrance if "norm" in name)
    assert copied.keys() | entrance == block_of(made["copy"]).keys()


def test_a_random_one_is_a_function_of_seed_and_name(source: Path, made: dict[str, Path], tmp_path: Path) -> None:
    found = block_of(made["random"])
    # Other layers are MoE, and other files are written.
    other = {**ASKED, "layers": [1], "max_shard_size": "20KB"}
    again = block_of(conversions.run(options(source, tmp_path / "again", mtp="random", **other)).directory)
    assert all(torch.equal(each, again[name]) for name, each in found.items())
    reseeded = block_of(conversions.run(options(source, tmp_path / "other", mtp="random", seed=1, **ASKED)).directory)
    vectors = {name for name, each in found.items() if each.dim() == 1}
    assert {name for name, each in found.items() if torch.equal(each, reseeded[name])} == vectors
    assert all(bool((found[name] == (not name.endswith("bias"))).all()) for name in vectors)
    matrices = [each.float() for name, each in found.items() if each.dim() == 2]
    assert torch.cat([each.flatten() for each in matrices]).std() == pytest.approx(0.02, rel=0.05)
    rows = found["mtp.layers.1.mixer.gate.weight"]
    assert torch.equal(rows[::2], rows[1::2])
    assert not torch.equal(rows[0], rows[2])


def logits(directory: Path) -> Tensor:
    with torch.inference_mode():
        found: Tensor = conversions.load(directory)(models.token_ids()).logits
    return found


def assert_untouched(directory: Path, without: Path) -> None:
    """Bit for bit."""
    assert torch.equal(logits(directory), logits(without)), "the model's own logits have moved"


@pytest.mark.parametrize("mtp", ["copy", "random"])
def test_the_models_own_logits_do_not_move(mtp: str, made: dict[str, Path], tmp_path: Path) -> None:
    """The mutant's norm is that of the block: one value of 32 differs, in its last bit."""
    assert_untouched(made[mtp], made["none"])
    mutant = shutil.copytree(made[mtp], tmp_path / "mutant")

    def nudge(tensors: dict[str, Tensor]) -> None:
        tensors["backbone.norm_f.weight"].view(torch.int16)[3] += 1

    conversions.edit(mutant, nudge)
    with pytest.raises(AssertionError, match="have moved"):
        assert_untouched(mutant, made["none"])


@pytest.mark.parametrize("mtp", ["copy", "random"])
def test_it_runs(mtp: str, made: dict[str, Path]) -> None:
    model = conversions.load(made[mtp])
    block = load_block(model, made[mtp])
    assert block
    hidden, embedded = torch.randn(2, 2, 5, HIDDEN)
    with torch.no_grad():
        assert block(hidden, embedded).isfinite().all()


def test_its_parameters_are_counted_apart(source: Path, made: dict[str, Path]) -> None:
    with_it, without = (prepare(options(source, "x", mtp=mtp, **ASKED), execute=False) for mtp in ("copy", "none"))
    counted, block = with_it.cost, sum(each.numel() for each in block_of(made["copy"]).values())
    assert counted.ahead_parameters == block == counted.parameters - without.cost.parameters
    assert without.cost.ahead_parameters == 0
    assert counted.active_parameters == without.cost.active_parameters
    assert counted.flops_per_token == without.cost.flops_per_token
    assert counted.bytes_to_write > without.cost.bytes_to_write
    stored = stored_sizes(made["copy"], describe_moe(made["copy"]))
    names = ("parameters", "ahead_parameters", "active_parameters")
    assert [stored[name] for name in names] == [getattr(counted, name) for name in names]


def test_plan_manifest_and_card_say_what_it_is(source: Path, made: dict[str, Path]) -> None:
    conversion = prepare(options(source, "x", mtp="copy", **ASKED), execute=False)
    origin = json.loads((made["copy"] / "upcycle_manifest.json").read_text())["tensors"]
    assert (
        origin["mtp.layers.0.eh_proj.weight"] == f"identity [{HIDDEN}, {2 * HIDDEN}] behind {HIDDEN} columns of zeros"
    )
    assert origin["mtp.layers.1.mixer.experts.3.up_proj.weight"] == origin[f"{MOE}mixer.experts.3.up_proj.weight"]
    planned = plan_json(conversion)
    assert {name: each["from"] for name, each in planned["tensors"].items()} == origin
    assert conversion.plan.losses == ()
    assert any("mtp=copy: a block *E" in note for note in planned["notes"])
    assert plan_table(conversion)
    assert (
        f"{conversion.cost.ahead_parameters:,} for multi-token prediction" in (made["copy"] / "README.md").read_text()
    )


@pytest.fixture(scope="module")
def ahead_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense hybrid with a block of its own."""
    directory = tmp_path_factory.mktemp("ahead_source") / "dense"
    return with_block(directory, "*-")


def with_block(directory: Path, pattern: str) -> Path:
    model = models.build("nemotron_h")
    block = attach(model, tuple(pattern))
    models.save(model, directory)
    tensors = {}
    for name, tensor in block.layers.state_dict(prefix="mtp.layers.").items():
        stem, _, matrix = name.rpartition(".")
        if stem.endswith("experts"):
            tensors |= {f"{stem}.{expert}.{matrix}.weight": each.clone() for expert, each in enumerate(tensor)}
        else:
            tensors[name] = tensor
    whole = {**conversions.read_tensors(directory), **tensors}
    save_file({name: each.contiguous() for name, each in whole.items()}, directory / "model.safetensors")
    return directory


@pytest.mark.parametrize("mtp", ["keep", "none", "copy"])
def test_a_sources_block(mtp: str, ahead_source: Path, tmp_path: Path) -> None:
    """Kept as it is, left out, or replaced; what is not kept is named."""
    done = conversions.run(options(ahead_source, tmp_path / "moe", mtp=mtp, **ASKED))
    stored, found = block_of(ahead_source), block_of(done.directory)
    raw = json.loads((done.directory / "config.json").read_text())
    assert raw["num_nextn_predict_layers"] == (mtp != "none")
    assert dict(done.plan.dropped) == ({} if mtp == "keep" else dict.fromkeys(stored, f"mtp={mtp}"))
    if mtp == "keep":
        assert raw["mtp_hybrid_override_pattern"] == "*-"
        assert all(torch.equal(found[name], each) for name, each in stored.items())
        assert prepare(options(ahead_source, "x", **ASKED), execute=False).cost.ahead_parameters > 0
    elif mtp == "copy":
        assert raw["mtp_hybrid_override_pattern"] == "*E"
        assert "mtp.layers.1.mixer.experts.0.up_proj.weight" in found
    else:
        assert not found


def refused(request: ConvertConfig, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        prepare(request, execute=False)


def test_what_cannot_be_is_refused(source: Path, tmp_path: Path) -> None:
    llama = models.save(models.build("llama"), tmp_path / "llama")
    refused(options(llama, "x", mtp="copy"), ConfigError, "no layers for multi-token prediction")
    generic = options(source, "x", mtp="random", target="upcycled_moe", **ASKED)
    refused(generic, TargetError, "multi-token prediction is there")
    refused(options(source, "x", mtp="both", **ASKED), ConfigError, "unknown value for mtp")
    own_experts = with_block(tmp_path / "experts", "*E")
    refused(options(own_experts, "x", **ASKED), TargetError, "experts that are not those of the mixture")
    prepare(options(own_experts, "x", mtp="copy", **ASKED), execute=False)
