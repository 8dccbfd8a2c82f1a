"""The frontier of arms and what it saves, against hand computation."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from written import write_arms, write_run

from upcycle.analysis import frontier, iso_loss_saving, load_runs
from upcycle.analysis.frontier import pareto, reaching
from upcycle.errors import RecordError

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd

POINTS = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=1, max_size=12)


@given(POINTS)
def test_the_pareto_set_is_what_no_other_point_beats(points: list[tuple[int, int]]) -> None:
    found = {point for point, best in zip(points, pareto(*zip(*points, strict=True)), strict=True) if best}
    beaten = {p for p in points if any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)}
    assert found == set(points) - beaten
    assert sum(pareto(*zip(*points, strict=True))) == len(found)  # equal points count once


def test_budgets_that_rounding_parts_are_one() -> None:
    cost, loss = [999.0, 1001.0, 2000.0], [3.0, 2.0, 1.0]
    assert pareto(cost, loss).tolist() == [True, True, True]
    assert pareto(cost, loss, 3.0).tolist() == [False, True, True]
    assert pareto(cost, loss, [2.0, 3.0, 3.0]).tolist() == [True, True, True]  # a whole step apart


def test_where_a_curve_reaches_a_loss() -> None:
    cost, loss = [0.0, 10.0, 20.0, 30.0], [4.0, 3.0, 3.5, 2.5]
    assert reaching(cost, loss, 3.25) == pytest.approx(7.5)
    assert reaching(cost, loss, 3.0) == 10.0
    assert reaching(cost, loss, 2.75) == pytest.approx(27.5)
    assert reaching(cost, loss, 5.0) == 0.0
    assert math.isnan(reaching(cost, loss, 2.0))


@pytest.fixture
def runs(tmp_path: Path) -> pd.DataFrame:
    """Upcycling against training from scratch, two seeds; 0, 1,000 and 2,000 FLOPs."""
    for seed in (0, 1):
        write_run(tmp_path / f"u{seed}", (4.0, 3.0 + seed, 2.0), seed=seed)
        write_run(tmp_path / f"s{seed}", (6.0, 5.0, 3.5), seed=seed, changes=("model=scratch",))
    return load_runs(tmp_path)


def test_points_are_means_over_seeds_with_intervals(runs: pd.DataFrame) -> None:
    points = frontier(runs, arms="model").set_index(["arm", "flops"])
    middle = points.loc[("upcycle", 1000.0)]
    half = 12.7062 * 0.5  # t of one degree at 0.975, times the standard error of 3 and 4
    assert (middle["seeds"], middle["loss"]) == (2, 3.5)
    assert (middle["low"], middle["high"]) == pytest.approx((3.5 - half, 3.5 + half), abs=1e-4)


def test_sunk_cost_is_charged_to_who_started_from_the_dense_model(runs: pd.DataFrame) -> None:
    points = frontier(runs, arms="model", sunk_flops=1000.0).set_index(["arm", "flops"])
    assert (points.loc["upcycle", "flops_with_sunk"] - points.loc["upcycle"].index == 1000).all()
    assert (points.loc["scratch", "flops_with_sunk"] == points.loc["scratch"].index).all()
    assert points["pareto"].to_dict() == {
        ("scratch", 0.0): False,
        ("scratch", 1000.0): False,
        ("scratch", 2000.0): False,
        ("upcycle", 0.0): True,
        ("upcycle", 1000.0): True,
        ("upcycle", 2000.0): True,
    }
    assert points["pareto_with_sunk"].to_dict() == {
        ("scratch", 0.0): True,
        ("scratch", 1000.0): False,  # 5.0, where upcycling has 4.0
        ("scratch", 2000.0): True,
        ("upcycle", 0.0): True,
        ("upcycle", 1000.0): False,  # 3.5 at 2,000, as scratch, which counts once
        ("upcycle", 2000.0): True,
    }


def test_saving_by_hand(runs: pd.DataFrame) -> None:
    """Scratch ends at 3.5 after 2,000. Upcycling is there after 500 (4 to 3), or 1,250 (4, 4, 2): 75 and 37.5 %."""
    found = iso_loss_saving(runs, arms="model", baseline="scratch", sunk_flops=400.0, allow=["source"]).iloc[0]
    assert (found["arm"], found["pairs"], found["reached"]) == ("upcycle", 2, 2)
    assert found["percent"] == pytest.approx((75 + 37.5) / 2)
    assert found["high"] - found["percent"] == pytest.approx(12.7062 * 37.5 / 2, rel=1e-5)
    assert found["percent_with_sunk"] == pytest.approx((75 + 37.5) / 2 - 20)  # 400 of 2,000 more in each pair


def test_nothing_is_saved_where_a_pair_does_not_get_there(tmp_path: Path) -> None:
    frame = load_runs(write_arms(tmp_path, {"exact": [3.0, 3.0], "paper": [2.9, 3.1]}))
    found = iso_loss_saving(frame, arms="init.scaling", baseline="exact").iloc[0]
    assert (found["pairs"], found["reached"]) == (2, 1)
    assert np.isnan(found["percent"])


def test_saving_needs_the_same_data_and_no_budget(tmp_path: Path) -> None:
    write_run(tmp_path / "long", (4.0, 3.5, 3.0))
    write_run(tmp_path / "short", (4.0, 2.5), changes=("init.scaling=paper",))
    found = iso_loss_saving(load_runs(tmp_path), arms="init.scaling", baseline="exact")
    assert found["percent"].tolist() == pytest.approx([100 * (1 - 2 / 3 / 2)])
    write_run(tmp_path / "other", (4.0, 2.5), changes=("init.scaling=none",), facts={"data_hash": "e"})
    with pytest.raises(RecordError, match="their data differ"):
        iso_loss_saving(load_runs(tmp_path), arms="init.scaling", baseline="exact")


def test_saving_without_another_arm_has_its_columns(runs: pd.DataFrame) -> None:
    alone = iso_loss_saving(runs[runs["model"] == "scratch"], arms="model", baseline="scratch")
    assert alone.empty
    assert list(alone) == list(iso_loss_saving(runs, arms="model", baseline="scratch", allow=["source"]))


@pytest.mark.parametrize(
    ("facts", "what"),
    [
        ({"data_hash": "e" * 64}, "data"),
        ({"order_hash": "e" * 64}, "order"),
        ({"source_sha256": {"f": "e"}}, "source"),
    ],
)
def test_a_frontier_of_runs_that_share_nothing_is_refused_unless_told(
    tmp_path: Path, runs: pd.DataFrame, facts: dict[str, object], what: str
) -> None:
    """One run of another text, order or dense model is enough; that of random weights has none, and is no other."""
    write_run(tmp_path / "odd", (4.0, 3.0, 2.0), seed=1, changes=("model=dense",), facts=facts)
    frame = load_runs(tmp_path)
    with pytest.raises(RecordError, match=f"the runs do not share their {what}\n") as error:
        frontier(frame, arms="model")
    assert f"allow=['{what}']" in str(error.value)
    assert set(frontier(frame, arms="model", allow=[what])["arm"]) == {"dense", "scratch", "upcycle"}
    with pytest.raises(RecordError, match="did you mean order"):
        frontier(frame, arms="model", allow=["orders"])


def test_a_frontier_is_of_finished_runs(tmp_path: Path, runs: pd.DataFrame) -> None:
    write_run(tmp_path / "u2", (4.0, 3.0), seed=2, facts={"status": "interrupted"})
    frame = load_runs(tmp_path)
    with pytest.raises(RecordError, match="runs have not finished"):
        frontier(frame, arms="model")
    assert frontier(frame, arms="model", allow=["status"])["seeds"].max() == 3
