"""The start lasts: twenty steps after a conversion, held-out loss is where the dense model's is.

The model and the text are real ones, because only a trained model has something to lose.
"""

from __future__ import annotations

import functools
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import training

if TYPE_CHECKING:
    from collections.abc import Callable

SOURCE = Path(__file__).parents[2] / "models/stdlib-250k"
STDLIB = Path(sysconfig.get_path("stdlib"))
MODULES = (
    "argparse",
    "ast",
    "calendar",
    "configparser",
    "datetime",
    "difflib",
    "doctest",
    "inspect",
    "locale",
    "optparse",
)
MARGIN = 1.01  # of the dense arm's loss at the same step; seen: at most 0.996
ARMS = {
    "dense": ("model=dense",),
    **{
        f"E8G{g}T{t} {order} {groups}": (
            "model=upcycle",
            f"moe.granularity={g}",
            f"moe.top_k={t}",
            f"moe.router_order={order}",
            *({"default": ()}.get(groups, (f"moe.groups={groups}",))),
            *(("target=upcycled_moe",) if groups == "positions" else ()),
        )
        for g, t, order in ((8, 8, "softmax_topk"), (2, 2, "softmax_topk"), (4, 8, "topk_softmax"))
        for groups in ("default", "whole", "positions", "free")
    },
}
HELD = [arm for arm in ARMS if arm != "dense" and "free" not in arm]
TORN = [arm for arm in ARMS if "free" in arm]


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[float]]:
    """Returns an arm's held-out losses after 5, 10, 15 and 20 steps; the start's comes first."""
    place = tmp_path_factory.mktemp("lasting")
    text = place / "text"
    text.mkdir()
    for name in MODULES:
        (text / f"{name}.txt").write_text((STDLIB / f"{name}.py").read_text())
    common = (
        f"source='{SOURCE}'",
        "sequence_length=128",
        "batch.sequences=8",
        "batch.micro=8",
        "budget.steps=20",
        "schedule=constant",
        "schedule.peak=1e-3",
        "schedule.warmup=2",
        "validation.every=5",
        "validation.windows=16",
        "metrics=cheap",
    )

    def made(arm: str) -> list[float]:
        output = place / arm
        training.run(training.options(text, output, *common, *ARMS[arm]))
        return [row["val/loss"] for row in training.rows(output) if "val/loss" in row]

    return functools.cache(made)


def assert_lasts(arm: list[float], dense: list[float]) -> None:
    """The one assertion, which the mutants must fail."""
    assert len(arm) == len(dense) == 5
    assert arm[0] == pytest.approx(dense[0], rel=1e-3)
    assert all(ours <= MARGIN * theirs for ours, theirs in zip(arm, dense, strict=True))


@pytest.mark.parametrize("arm", HELD)
def test_held_out_loss_stays_with_the_dense_arm(arm: str, losses: Callable[[str], list[float]]) -> None:
    assert_lasts(losses(arm), losses("dense"))


@pytest.mark.parametrize("arm", TORN)
def test_groups_that_come_apart_are_noticed(arm: str, losses: Callable[[str], list[float]]) -> None:
    """The mutants: experts chosen one by one."""
    with pytest.raises(AssertionError):
        assert_lasts(losses(arm), losses("dense"))
