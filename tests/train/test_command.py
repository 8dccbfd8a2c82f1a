"""`upcycle train` and `upcycle export` as their user meets them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import training
from cli import process

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from cli import Outcome

pytest_plugins = ("text_model", "tiny")


@pytest.fixture
def arguments(text: Path, text_model: Path, tmp_path: Path) -> list[str]:
    return ["model=upcycle", f"source={text_model}", f"output={tmp_path / 'run'}", *training.overrides(text)]


def test_train_export_evaluate(text: Path, tmp_path: Path, arguments: list[str]) -> None:
    """As processes, with the progress bar, from a panel to a table."""
    trained = process("train", *arguments, *training.SMALL_MOE, "progress=true", cwd=tmp_path)
    assert trained.status == 0, trained.err
    for shown in (
        "upcycle: qwen2_moe",
        "E2G2T2, softmax_topk, kernel",
        "tied: the router rows",
        "6 steps, 768 tokens",
        str(tmp_path)[:40],
    ):
        assert shown in " ".join((trained.out + trained.err).replace("│", "").split()).replace("\n", ""), shown
    assert "val/loss" in trained.out
    exported = process("export", f"run={tmp_path / 'run'}", f"output={tmp_path / 'out'}", cwd=tmp_path)
    assert exported.out == f"wrote {tmp_path / 'out'}\n"
    evaluated = process(
        "evaluate", f"model={tmp_path / 'out'}", *training.overrides(text)[:4], "sequence_length=32", "tokens=128",
        "format=json", cwd=tmp_path,
    )  # fmt: skip
    loss = json.loads(evaluated.out)["domains"]["text"]["loss"]
    assert loss == pytest.approx(
        json.loads((tmp_path / "run" / "run.json").read_text())["summary"]["val/loss"], rel=1e-4
    )


def test_mistakes_are_told_without_a_traceback(upcycle: Callable[..., Outcome], arguments: list[str]) -> None:
    upcycle("train", *arguments, "kernel=fats").refused("unknown kernel", found="fats")
    upcycle("train", *arguments, "moe.top_k=3").refused("top_k")
    grouped = (*arguments, *training.SMALL_MOE)
    upcycle("train", *grouped, "moe.groups=positions", "target=qwen2_moe").refused(
        "target=qwen2_moe cannot express", found="moe.groups is positions, it can express tied"
    )
    upcycle("train", *grouped, "router.release={until: 2, then: free}").refused("outside the budget", found="2.0")
    upcycle("train", *grouped, "balance.aux_loss=0", "target=upcycled_moe", "router.expert_choice=true").refused(
        "choose one by one", found="router.expert_choice=true with moe.groups=positions"
    )
    upcycle("train", *arguments, "moe.granularity=1", "moe.top_k=1", "moe.groups=tied").refused(
        "moe.groups=tied needs virtual groups, and there are none", found="granularity=1"
    )
    upcycle("train", *arguments, "model=sparse").refused("model is not valid", found="sparse")
    upcycle("train", *arguments, "optim.lr=1").refused("optim.lr")
    upcycle("train", *arguments[1:]).refused("a required option is missing")
    upcycle("export", "run=nowhere", "output=out").refused("there is no run", found="nowhere")


def test_the_shipped_experiments_compose(upcycle: Callable[..., Outcome]) -> None:
    composed = upcycle("train", "experiment=stdlib_2m", "output=x", "--cfg", "job").out
    for line in ("  hidden_size: 192", "  steps: 1100", "tokenizer: bytes", "model: scratch", "  peak: 0.002"):
        assert line in composed
