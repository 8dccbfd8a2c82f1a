"""What fails on all ranks: what one rank finds is what every rank says, and no rank waits for another."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import models
import pytest
import torch
import training
from launching import on_ranks
from safetensors.torch import load_file
from test_parity import job

from upcycle.distributed.ranks import Ranks
from upcycle.errors import ConfigError
from upcycle.parallel.rank_layout import RankLayout
from upcycle.train.models import start_model

if TYPE_CHECKING:
    from pathlib import Path

pytest_plugins = ("text_model",)
TWO = Ranks(layout=RankLayout(fsdp=2))
LAYOUT = "fsdp2 x ep2"
PEAK = 1e9  # FLOP/s


@pytest.fixture(scope="module")
def gpt2(text_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 with the tokenizer of the other models."""
    directory = models.save(models.build("gpt2", vocab_size=300), tmp_path_factory.mktemp("gpt2"))
    for file in text_model.glob("tokenizer*"):
        (directory / file.name).write_bytes(file.read_bytes())
    return directory


@pytest.fixture(scope="module")
def place(text_model: Path, gpt2: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks said of each case, `CASE.RANK`; and `run`, which a full disk stopped and that then went on."""
    root = tmp_path_factory.mktemp("refused")
    saving = ("checkpoint_every=2", "budget.steps=5", "resume=auto", f"peak_flops={PEAK}")

    def case(name: str, source: Path, *changes: str, **more: object) -> dict[str, object]:
        more = {"refused": str(root / name), **more}
        return job("qwen2_moe", LAYOUT, source, text, root / f"{name}-run", *changes, **more)

    def run(**more: object) -> dict[str, object]:
        return job("qwen2_moe", LAYOUT, text_model, text, root / "run", *saving, **more)

    of_gpt2 = ("moe.granularity=1", "moe.top_k=1", "balance.z_loss=0", "target=upcycled_moe")
    jobs = [
        case("tensor parallel", gpt2, *of_gpt2, "parallel=tp_ep", "balance.statistics=micro_batch"),
        case("layers", gpt2, *of_gpt2, "balance.statistics=micro_batch"),
        case("dense layers", gpt2, "model=dense", "parallel=fsdp"),
        case("loss", text_model, change="rank 1's loss is NaN"),
        case("embedding", text_model, change="the embedding of a token is NaN that only rank 1 has"),
        run(stop_after=3),
        run(change="rank 1's disk is full", refused=str(root / "disk")),
        run(),
    ]
    on_ranks(2, jobs, root)
    return root


def said(place: Path, case: str) -> str:
    """What both ranks said."""
    first, second = (place.joinpath(f"{case}.{rank}").read_text() for rank in (0, 1))
    assert first == second
    return first


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("tensor parallel", "the model cannot be laid out over the ranks like this"),
        ("layers", "no plan that gathers this family layer by layer"),
        ("dense layers", "GPT2LMHeadModel"),
    ],
)
def test_families_that_cannot_be_sharded(case: str, expected: str, place: Path) -> None:
    assert expected in said(place, case)
    assert not (place / f"{case}-run").exists()


def test_the_rank_whose_loss_is_not_finite_is_named(place: Path) -> None:
    assert "found:    nan at step 1 on rank 1, first in the loss itself" in said(place, "loss")


def test_a_weight_that_is_not_finite_is_named_whatever_rank_holds_it(place: Path) -> None:
    """Only one rank's batch meets it: what only that rank asks of the others would wait for ever."""
    expected = "nan at step 1 on rank 1, first in model.embed_tokens (its weight is not finite)"
    assert expected in said(place, "embedding")


def test_a_full_disk_of_one_rank_ends_training_and_keeps_the_checkpoint(place: Path) -> None:
    assert said(place, "disk").startswith(f"cannot write {place}/run/checkpoints/")
    assert "No space left on device" in said(place, "disk")
    names = {each.name for each in (place / "run/checkpoints").iterdir()}
    assert "last.ckpt.5" in names
    assert len(names) == 4  # two links, and what they name


def test_mfu_is_of_all_devices(place: Path) -> None:
    flops = json.loads((place / "run/run.json").read_text())["flops_per_step"]
    lines = [json.loads(line) for line in (place / "run/metrics.jsonl").read_text().splitlines()]
    rows = [row for row in lines if "train/mfu" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    for row in rows:
        assert row["train/mfu"] * row["train/step_seconds"] == pytest.approx(flops / (2 * PEAK))


def test_a_pickle_cannot_be_read_in_slices(text_model: Path, text: Path, tmp_path: Path) -> None:
    source = shutil.copytree(text_model, tmp_path / "pickle")
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    for model in ("dense", "upcycle"):
        config = training.options(text, tmp_path / "run", f"model={model}", f"source='{source}'", *training.SMALL_MOE)
        with pytest.raises(ConfigError, match=r"only of safetensors files(.|\n)*pytorch_model\.bin"):
            start_model(config, TWO)


def test_no_rank_measures_the_dense_model_whole(text_model: Path, text: Path, tmp_path: Path) -> None:
    given = ("model=upcycle", f"source='{text_model}'", *training.SMALL_MOE, "init.scaling=calibrated")
    with pytest.raises(ConfigError, match=r"init\.scaling=calibrated(.|\n)*found: +2 ranks(.|\n)*convert first"):
        start_model(training.options(text, tmp_path / "run", *given), TWO)
