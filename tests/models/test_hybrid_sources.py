"""Hybrid checkpoints that cannot be converted, or read as a mixture, and what is said of them."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import conversions
import models
import pytest
import torch
from conversions import options

from upcycle.convert.prepare import prepare
from upcycle.errors import ConfigError, SourceError, TargetError
from upcycle.models.moe import describe_moe
from upcycle.models.source import open_source
from upcycle.routing.check import check_routing
from upcycle.routing.config import BalanceConfig, RouterConfig

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

NAMES = ["linear_attention", "mlp", "full_attention", "mlp"]
OWN = {"router_order": "auto"}


@pytest.fixture
def source(dense: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of a hybrid of pattern M-*-, to be spoilt."""
    return shutil.copytree(dense("nemotron_h"), tmp_path / "source")


def say(directory: Path, **fields: object) -> None:
    """Change fields of config.json; None removes one."""
    file = directory / "config.json"
    changed = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({name: value for name, value in changed.items() if value is not None}))


@pytest.mark.parametrize(
    ("fields", "says", "found"),
    [
        ({"layers_block_type": None}, "does not say which kind each layer is", "neither hybrid_override_pattern"),
        ({"layers_block_type": None, "hybrid_override_pattern": "M-|-"}, "layers of an unknown kind", "'|'"),
        ({"layers_block_type": ["mlp", "mambo"]}, "layers of an unknown kind", "'mambo'"),
        ({"hybrid_override_pattern": "M-*M"}, "layers_block_type of config.json disagree", "M-*M and M-*-"),
        ({"hybrid_override_pattern": "M-*"}, "layers_block_type of config.json disagree", "M-* and M-*-"),
        ({"layers_block_type": ["linear_attention", *["mlp"] * 3]}, "the model has no attention layer", "M---"),
        ({"layers_block_type": [*NAMES[:3], "moe"]}, "already a mixture of experts", "model_type=nemotron_h"),
        ({"layers_block_type": [*NAMES, "mlp"]}, "lacks tensors of a nemotron_h model", "23 tensors"),
        ({"layers_block_type": NAMES[:3]}, "tensors that a nemotron_h model does not have", "backbone.layers.3"),
        ({"mamba_num_heads": 8}, "does not have the shape that config.json says", "(4,)"),
    ],
    ids=str,
)
def test_a_config_that_does_not_fit(fields: dict[str, object], says: str, found: str, source: Path) -> None:
    say(source, **fields)
    with pytest.raises(SourceError) as raised:
        open_source(str(source))
    what, shown, *_ = str(raised.value).splitlines()
    assert says in what
    assert found in shown


def test_a_quantised_one_whose_config_does_not_say_so(source: Path) -> None:
    (source / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    with pytest.raises(SourceError, match="the source is quantised(.|\n)*hf_quant_config.json"):
        open_source(str(source))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint8])
def test_weights_that_are_no_floats(dtype: torch.dtype, source: Path, tmp_path: Path) -> None:
    name = "backbone.layers.1.mixer.up_proj.weight"
    conversions.edit(source, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    with pytest.raises(SourceError, match=rf"not stored in a floating-point type(.|\n)*{name} is (F8_E4M3|U8)"):
        conversions.run(options(source, tmp_path / "moe", **OWN))
    assert not (tmp_path / "moe").exists()


def test_scales_of_quantised_weights(source: Path) -> None:
    scale = "backbone.layers.1.mixer.up_proj.weight_scale"
    conversions.edit(source, lambda tensors: tensors.update({scale: torch.ones(())}))
    with pytest.raises(SourceError, match=rf"tensors that a nemotron_h model does not have(.|\n)*{scale}"):
        open_source(str(source))


def test_no_layer_with_an_ffn(tmp_path: Path) -> None:
    model = models.build("nemotron_h", hybrid_override_pattern="M*M*")
    source = models.save(model, tmp_path / "source")
    with pytest.raises(ConfigError, match="no layer of the model has an FFN"):
        prepare(options(source, tmp_path / "moe", **OWN), execute=False)


@pytest.mark.parametrize("target", ["auto", "nemotron_h", "upcycled_moe"])
def test_one_sigmoid_divided_by_itself(target: str, source: Path, tmp_path: Path) -> None:
    """Its weight is 1 whatever the router says, so that the router would never learn."""
    request = options(source, tmp_path / "moe", target=target, granularity=1, top_k=1, **OWN)
    with pytest.raises(ConfigError) as raised:
        prepare(request, execute=False)
    assert "is always 1, and no router learns" in str(raised.value)
    remedies = "set moe.top_k to 2 or more, or moe.router_order=softmax_topk with target=auto"
    assert str(raised.value).endswith(remedies)
    asked = {"target": target, "granularity": 1, **OWN}
    for remedy in ({"top_k": 2}, {"top_k": 1, "router_order": "softmax_topk", "target": "auto"}):
        prepare(options(source, tmp_path / "moe", **asked | remedy), execute=False)


def test_ffn_biases(dense: Callable[[str], Path], tmp_path: Path) -> None:
    """Transformers' experts of this type have none."""
    source, output = dense("nemotron_h_biases"), tmp_path / "moe"
    with pytest.raises(TargetError, match="FFN bias is present, it can express none(.|\n)*set target=upcycled_moe"):
        prepare(options(source, output, target="nemotron_h", **OWN), execute=False)
    plan = prepare(options(source, output, **OWN), execute=False).plan
    assert plan.target == "upcycled_moe"
    assert "nemotron_h: FFN bias is present, it can express none" in plan.why


@pytest.fixture(scope="module")
def mixture(dense: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight experts of which two are chosen."""
    return conversions.run(options(dense("nemotron_h"), tmp_path_factory.mktemp("mixture") / "moe", **OWN)).directory


@pytest.mark.parametrize(("groups", "chosen"), [(8, 8), (3, 1), (16, 1)])
def test_groups_without_two_best_experts(groups: int, chosen: int, mixture: Path, tmp_path: Path) -> None:
    """Transformers sums the best two of each: topk(2) of one expert has no answer."""
    moe = shutil.copytree(mixture, tmp_path / "moe")
    say(moe, n_group=groups, topk_group=chosen)
    with pytest.raises(SourceError, match=rf"no two best experts(.|\n)*n_group={groups}, 8 experts"):
        describe_moe(moe)


@pytest.mark.parametrize(("groups", "chosen"), [(1, 1), (4, 4), (2, 2)])
def test_groups_that_exclude_nothing_are_trained(groups: int, chosen: int, mixture: Path, tmp_path: Path) -> None:
    moe = shutil.copytree(mixture, tmp_path / "moe")
    say(moe, n_group=groups, topk_group=chosen)
    check_routing(describe_moe(moe), RouterConfig(), BalanceConfig())


def test_groups_that_training_would_ignore(mixture: Path, tmp_path: Path) -> None:
    moe = shutil.copytree(mixture, tmp_path / "moe")
    say(moe, n_group=4, topk_group=2)
    with pytest.raises(ConfigError, match="from some groups of neighbours(.|\n)*n_group=4, topk_group=2"):
        check_routing(describe_moe(moe), RouterConfig(), BalanceConfig())


def test_groups_that_training_would_ignore_change_the_model(mixture: Path, tmp_path: Path) -> None:
    """So the refusal is not for nothing: two of four groups exclude experts that would have been chosen."""

    def logits(directory: Path) -> Tensor:
        return conversions.outputs(directory)["logits"]

    moe = shutil.copytree(mixture, tmp_path / "moe")
    rows = torch.randn(8, models.HIDDEN, generator=torch.Generator().manual_seed(0))
    conversions.edit(moe, lambda tensors: tensors["backbone.layers.1.mixer.gate.weight"].copy_(rows))
    before = logits(moe)
    say(moe, n_group=4, topk_group=1)
    assert float((logits(moe) - before).abs().max()) > 1e-3
