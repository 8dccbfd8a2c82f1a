"""Training of experts in fewer dimensions: the same start as convert's, what gets gradients, and the paper's shapes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import conversions
import models
import pytest
import torch
import training

from upcycle.convert.materialise import Materialiser
from upcycle.convert.prepare import prepare
from upcycle.convert.slices import SlicedTensor, SliceMaterialiser
from upcycle.distributed.ranks import Ranks
from upcycle.errors import ConfigError
from upcycle.models.load import load_checkpoint
from upcycle.models.moe import describe_moe
from upcycle.parallel.rank_layout import RankLayout
from upcycle.train.flops import forward_flops
from upcycle.train.models import conversion_request, start_model
from upcycle.train.optim import parameter_groups

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytest_plugins = ("text_model",)

LATENT = models.HIDDEN // 2
COMPRESS = ("init.latent=compress", f"calibration_tokens={4 * models.HIDDEN}")
STARTS = {
    "exact": (),
    "calibrated": ("init.scaling=calibrated", COMPRESS[1]),
    "compress": (*COMPRESS, "moe.shared_neurons=8"),
}


def asked(source: Path, *changes: str) -> list[str]:
    return ["model=upcycle", f"source='{source}'", *training.SMALL_MOE, f"moe.latent={LATENT}", *changes]


@pytest.mark.parametrize("start", STARTS)
def test_upcycling_in_memory_is_convert_and_load(text: Path, text_model: Path, tmp_path: Path, start: str) -> None:
    config = training.options(text, tmp_path / "run", *asked(text_model, *STARTS[start]))
    made = start_model(config)
    names = {"expansion": 2, "granularity": 2, "top_k": 2, "dtype": "float32", "portable": False, "router_std": None}
    given = {"latent": LATENT, "latent_start": "compress" if start == "compress" else "exact", **names}
    given |= {"calibration_tokens": 4 * models.HIDDEN, "scaling": "calibrated" if start == "calibrated" else "exact"}
    given |= {"shared_neurons": 8} if start == "compress" else {}
    written = conversions.run(conversions.options(text_model, tmp_path / "moe", **given)).directory
    found = conversions.load(written)
    assert training.differing_tensors(made.model.state_dict(), found.state_dict()) == []
    assert made.moe is not None
    assert (made.moe.latent, made.moe.model_type) == (LATENT, "upcycled_moe")
    assert describe_moe(written).latent == LATENT


def test_gradients_of_the_exact_start(text: Path, text_model: Path, tmp_path: Path) -> None:
    """fc2 alone at first, as it is 0; then everything."""
    made = start_model(training.options(text, tmp_path / "run", *asked(text_model)))
    block = made.model.moe_blocks[0]
    ids = models.token_ids()
    optimizer = torch.optim.SGD(made.model.parameters(), lr=0.1)

    def norms() -> dict[str, float]:
        optimizer.zero_grad()
        made.model(input_ids=ids, labels=ids).loss.backward()
        parts = {
            "fc1": block.fc1_latent_proj,
            "fc2": block.fc2_latent_proj,
            "experts": block.experts,
            "gate": block.gate,
        }
        return {name: max(float(p.grad.abs().max()) for p in part.parameters()) for name, part in parts.items()}

    first = norms()
    assert first.pop("fc2") > 0
    assert set(first.values()) == {0.0}
    optimizer.step()
    assert min(norms().values()) > 0


@pytest.mark.parametrize("start", ["exact", "compress"])
def test_it_trains(text: Path, text_model: Path, tmp_path: Path, start: str) -> None:
    training.run(training.options(text, tmp_path / "run", *asked(text_model, *STARTS[start], "metrics=dense")))
    rows = training.rows(tmp_path / "run")
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert losses[-1] < losses[0]
    similar = [row for row in rows if "moe/group_cosine" in row]
    assert similar
    # Experts of 16 dimensions cannot be compared with shards of 32.
    assert not any("moe/dense_cosine" in row for row in rows)


def test_projections_are_ordinary_matrices(text: Path, text_model: Path, tmp_path: Path) -> None:
    config = training.options(text, tmp_path / "run", *asked(text_model))
    made = start_model(config)
    groups = parameter_groups(made.model, made.moe, config.optim, peak=1.0)
    matrices = next(group["params"] for group in groups if group["name"] == "matrices")
    block = made.model.moe_blocks[0]
    for projection in (block.fc1_latent_proj, block.fc2_latent_proj):
        assert any(parameter is projection.weight for parameter in matrices)


def test_from_scratch_no_projection_is_zero(text: Path, text_model: Path, tmp_path: Path) -> None:
    config = training.options(text, tmp_path / "run", *asked(text_model, "model=scratch"))
    for block in start_model(config).model.moe_blocks:
        for projection in (block.fc1_latent_proj, block.fc2_latent_proj):
            assert float(projection.weight.detach().std()) == pytest.approx(0.02, rel=0.2)


@pytest.mark.parametrize("name", ["llama", "nemotron_h"])
def test_alpha_times_more_experts_and_top_k_cost_the_same(
    name: str, dense: Callable[[str], Path], tmp_path: Path
) -> None:
    """The paper's variant for accuracy: L = H / 2, twice the experts and top-k. What is left is projections, router."""
    order, target = ("sigmoid_topk", "nemotron_h") if name == "nemotron_h" else ("topk_softmax", "upcycled_moe")
    asked_for = {"router_order": order, "target": target, "shared_neurons": "all"}
    shapes = {"plain": {}, "accurate": {"latent": LATENT, "expansion": 8, "top_k": 4}}
    experts, flops = {}, {}
    for shape, changes in shapes.items():
        request = conversions.options(dense(name), tmp_path / shape, **asked_for, **changes)
        done = conversions.run(request)
        tensors = conversions.read_tensors(done.directory)
        experts[shape] = sum(tensor.numel() for key, tensor in tensors.items() if ".experts." in key)
        model, moe = load_checkpoint(done.directory), describe_moe(done.directory)
        flops[shape] = forward_flops(model, moe, sequence_length=0)
        if name == "llama":  # what mixes positions in a hybrid is more than its matrices
            assert prepare(request, execute=False).cost.flops_per_token == flops[shape]
    assert experts["accurate"] == experts["plain"]
    projections, rows = 2 * models.HIDDEN * LATENT, 8 * models.HIDDEN
    assert flops["accurate"] - flops["plain"] == 2 * models.LAYERS * (projections + rows)


def test_no_rank_measures_projections(text: Path, text_model: Path, tmp_path: Path) -> None:
    config = training.options(text, tmp_path / "run", *asked(text_model, *COMPRESS))
    with pytest.raises(ConfigError, match=r"init\.latent=compress measures(.|\n)*found: +2 ranks(.|\n)*convert first"):
        start_model(config, Ranks(layout=RankLayout(fsdp=2)))


def test_slices_of_projections_are_those_of_the_whole(text: Path, text_model: Path, tmp_path: Path) -> None:
    """What a rank makes of an exact start, which measures nothing."""
    request = conversion_request(training.options(text, tmp_path / "run", *asked(text_model)))
    conversion = prepare(request, execute=True)
    read, shapes = conversion.source.read, conversion.source.model.tensors()
    whole, slices = Materialiser(read, 0, conversion.bases), SliceMaterialiser(read, 0, shapes, conversion.bases)
    for tensor in conversion.plan.tensors:
        expected = whole.tensor(tensor, torch.float32)
        half = tuple(slice(size // 2, size) for size in tensor.shape)
        assert torch.equal(SlicedTensor(tensor, slices)[half], expected[half]), tensor.name
        rows = (slice(1, None), *(slice(None) for _ in tensor.shape[1:]))
        assert torch.equal(SlicedTensor(tensor, slices)[rows], expected[rows]), tensor.name
