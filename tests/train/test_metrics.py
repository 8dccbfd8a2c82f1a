"""What the record holds, and that it is right."""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING

import models
import pytest
import rewards
import torch
import training

from upcycle.routing.statistics import RoutingSums
from upcycle.tracking.schema import METRICS
from upcycle.train.metrics import routing_row
from upcycle.train.models import start_model
from upcycle.train.similarity import dense_cosine, expert_matrices, group_cosine

if TYPE_CHECKING:
    from pathlib import Path

pytest_plugins = ("text_model",)


@pytest.fixture(scope="module")
def moe_run(text: Path, text_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("metrics") / "run"
    made = ["model=upcycle", f"source='{text_model}'", *training.SMALL_MOE, "metrics=dense", "peak_flops=1e12"]
    training.run(training.options(text, output, *made))
    return output


def test_the_schema_names_every_metric_and_no_other(
    moe_run: Path, text: Path, text_model: Path, tmp_path: Path
) -> None:
    distilled, lower = tmp_path / "distilled", ("precision=bf16", "quantise.rest=float32")
    dense = ("model=dense", f"source='{text_model}'", *lower)
    training.run(training.options(text, distilled, *dense, "distill.weight=0.5"))
    scored = tmp_path / "scored"
    ratings = rewards.rated(tmp_path / "ratings.jsonl")
    training.run(rewards.options(ratings, scored, *dense))
    ahead, hybrid = tmp_path / "ahead", models.save(models.build("nemotron_h", vocab_size=300), tmp_path / "hybrid")
    several = ("model=upcycle", f"source='{hybrid}'", "tokenizer=bytes", "mtp.start=random", *training.SMALL_MOE)
    training.run(training.options(text, ahead, *several))
    runs = (moe_run, distilled, scored, ahead)
    lines = [line for run in runs for line in (run / "metrics.jsonl").read_text().splitlines()]
    names = {name for line in lines for name in json.loads(line)} - {"step", "time"}
    general = {re.sub(r"layer_\d+", "layer_{layer}", name.replace("/text/", "/{domain}/")) for name in names}
    attribute = "|".join(rewards.ATTRIBUTES)
    general = {re.sub(f"/({attribute})/", "/{attribute}/", name) for name in general}
    general = {re.sub(r"/mtp_\d/", "/mtp_{ahead}/", name) for name in general}
    assert general == {metric.name for metric in METRICS}


def test_rows_agree_with_each_other(moe_run: Path) -> None:
    rows = training.rows(moe_run)
    losses = [row for row in rows if "train/loss" in row]
    assert [row["step"] for row in losses] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "val/loss" in row] == [0, 3, 6]
    run = json.loads((moe_run / "run.json").read_text())
    for row in losses:
        assert row["train/perplexity"] == pytest.approx(math.exp(row["train/loss"]))
        assert row["train/tokens"] == row["step"] * 4 * 32
        assert row["train/flops"] == row["step"] * run["flops_per_step"]
        for layer in (0, 1):
            load = row[f"moe/layer_{layer}/load"]
            assert sum(load) == pytest.approx(1)
            assert row[f"moe/layer_{layer}/max_vio"] == pytest.approx(max(load) * len(load) - 1)
            assert row[f"moe/layer_{layer}/dropped_share"] == 0
        assert row["moe/max_vio"] == pytest.approx(sum(row[f"moe/layer_{i}/max_vio"] for i in (0, 1)) / 2)
    assert run["status"] == "finished"
    assert run["summary"]["val/loss"] == next(row["val/loss"] for row in reversed(rows) if "val/loss" in row)


def test_experts_leave_the_dense_model_as_they_learn(moe_run: Path) -> None:
    rows = [row for row in training.rows(moe_run) if "moe/dense_cosine" in row]
    assert [row["step"] for row in rows] == [0, 3, 6]
    assert rows[0]["moe/dense_cosine"] == pytest.approx(1, abs=1e-6)
    assert rows[0]["moe/group_cosine"] == pytest.approx(1, abs=1e-6)
    assert 0.5 < rows[2]["moe/dense_cosine"] < 0.9999
    assert all(len(row["moe/layer_0/dense_cosine"]) == 4 for row in rows)


def test_routing_row_by_hand() -> None:
    sums = RoutingSums(
        load=torch.tensor([[6, 2, 0, 0]]),
        tokens=torch.tensor([4]),
        dropped=torch.tensor([2]),
        entropy=torch.tensor([4 * 1.2], dtype=torch.float64),
        mass=torch.tensor([4 * 0.7], dtype=torch.float64),
        whole=torch.tensor([3]),
    )
    row = routing_row(sums, (5,))
    assert row["moe/layer_5/load"] == [0.75, 0.25, 0, 0]
    assert row["moe/max_vio"] == 2.0
    assert row["moe/dead_experts"] == 2
    assert row["moe/dropped_share"] == 0.25
    assert row["moe/router_entropy"] == pytest.approx(1.2)
    assert row["moe/selected_mass"] == pytest.approx(0.7)
    assert row["moe/layer_5/whole_ffns"] == row["moe/whole_ffns"] == 0.75
    assert row["moe/load_entropy"] == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4))


def test_cosines_against_loops(text: Path, text_model: Path, tmp_path: Path) -> None:
    made = ["model=upcycle", f"source='{text_model}'", *training.SMALL_MOE, "init=noise", "init.std=0.5"]
    start = start_model(training.options(text, tmp_path / "run", *made))
    assert start.moe is not None
    experts = expert_matrices(start.model.get_submodule(start.moe.experts_path(0)))
    assert set(experts) == {"gate", "up", "down"}
    shards = {
        name: torch.randn(2, weight.shape[1], generator=torch.Generator().manual_seed(0))
        for name, weight in experts.items()
    }

    def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
        return float(one @ other / (one.norm() * other.norm()))

    expected = [sum(cosine(experts[m][e], shards[m][e % 2]) for m in experts) / 3 for e in range(4)]
    assert dense_cosine(experts, shards).tolist() == pytest.approx(expected, abs=1e-5)
    pairs = [cosine(experts[m][g], experts[m][2 + g]) for m in experts for g in (0, 1)]
    assert group_cosine(experts, granularity=2) == pytest.approx(sum(pairs) / 6, abs=1e-5)
    assert group_cosine(experts, granularity=4) is None


def test_cosines_of_zeros() -> None:
    """All zeros equal all zeros, and nothing else: a lossless start is at 1 even where a matrix is zero."""
    shards = {"down": torch.tensor([[1.0, 2.0], [0.0, 0.0]])}
    experts = {"down": shards["down"].repeat(3, 1)}
    assert dense_cosine(experts, shards).tolist() == pytest.approx([1.0] * 6)
    assert group_cosine(experts, granularity=2) == pytest.approx(1.0)
    experts["down"][5] = 1.0
    assert dense_cosine(experts, shards).tolist() == pytest.approx([1.0] * 5 + [0.0])
    assert group_cosine(experts, granularity=2) == pytest.approx((1 + 1 / 3) / 2)


COME_APART = "virtual groups have come apart"
RUINOUS = ("schedule=constant", "schedule.peak=1e-2", "schedule.warmup=1", "optim.router_lr=30")


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        (("moe.groups=free",), 1),
        ((), 0),
        (("moe.groups=positions",), 0),
        (("moe.groups=tied", "router.release={until: 0.2, then: free}"), 0),
    ],
)
def test_groups_that_come_apart_are_said_once(
    groups: tuple[str, ...],
    said: int,
    text: Path,
    text_model: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    made = ["model=upcycle", f"source='{text_model}'", *training.SMALL_MOE, *RUINOUS, *groups, "budget.steps=8"]
    with caplog.at_level("WARNING", logger="upcycle"):
        training.run(training.options(text, tmp_path / "run", *made))
    messages = [record.getMessage() for record in caplog.records if COME_APART in record.getMessage()]
    assert len(messages) == said
    assert all("moe.groups=tied" in message and "target=upcycled_moe" in message for message in messages)
    shares = [row["moe/whole_ffns"] for row in training.rows(tmp_path / "run") if "moe/whole_ffns" in row]
    assert shares[0] == 1
    assert min(shares) < 0.9 or not said
    assert min(shares) == 1 or any("free" in each for each in groups)


def test_metrics_can_be_off(text: Path, text_model: Path, tmp_path: Path) -> None:
    made = ["model=upcycle", f"source='{text_model}'", *training.SMALL_MOE, "metrics=off"]
    routing = training.run(training.options(text, tmp_path / "run", *made)).module.routing
    assert routing is not None
    assert all(router.sums is None for router in routing.routers.values()), "measured for nothing"
    assert not any(name.startswith("moe/") for row in training.rows(tmp_path / "run") for name in row)
