"""Comparisons: what they report against hand computation, what they call it, and what they refuse to compare."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pytest
from scipy import stats
from written import write_arms, write_run

from upcycle.analysis import compare, gap_closure, iso_loss_saving, load_runs
from upcycle.errors import RecordError

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd

EXACT, PAPER, NONE = [3.0, 3.1, 2.9], [2.8, 2.95, 2.71], [3.02, 3.1, 2.91]


@pytest.fixture
def runs(tmp_path: Path) -> pd.DataFrame:
    return load_runs(write_arms(tmp_path, {"exact": EXACT, "paper": PAPER, "none": NONE}))


def compared(frame: pd.DataFrame, **given: object) -> pd.DataFrame:
    return compare(frame, **{"arms": "init.scaling", "baseline": "exact", **given}).set_index("arm")


def test_a_comparison_by_hand(runs: pd.DataFrame) -> None:
    found = compared(runs).loc["paper"]
    difference, percent = (np.array(PAPER) - EXACT), 100 * (np.array(PAPER) / EXACT - 1)
    assert (found["baseline"], found["value"]) == pytest.approx((np.mean(EXACT), np.mean(PAPER)))
    assert (found["difference"], found["percent"]) == pytest.approx((difference.mean(), percent.mean()))
    test = stats.ttest_rel(PAPER, EXACT)
    assert found["p"] == pytest.approx(test.pvalue)
    assert (found["low"], found["high"]) == pytest.approx(test.confidence_interval(0.95))
    interval = stats.ttest_1samp(percent, 0).confidence_interval(0.95)
    assert (found["percent_low"], found["percent_high"]) == pytest.approx(interval)
    assert found["p_holm"] == pytest.approx(2 * test.pvalue)  # the smaller of two
    assert (found["pairs"], found["unpaired"], found["equal"], found["differs"]) == (3, 0, "tokens, FLOPs", "")


def test_a_baseline_of_zero(tmp_path: Path) -> None:
    """As with a share of dropped tokens: no percentage of 0, unless nothing differs."""
    arms = {"exact": [0.0, 0.0, 0.0], "paper": [0.1, 0.0, 0.2], "none": [0.0, 0.0, 0.0]}
    found = compared(load_runs(write_arms(tmp_path, arms)))
    assert found.loc["paper", "difference"] == pytest.approx(0.1)
    assert np.isnan(found.loc["paper", ["percent", "percent_low", "percent_high"]].astype(float)).all()
    assert (found.loc["none", "percent"], found.loc["none", "verdict"]) == (0.0, "same")


def test_runs_are_paired_by_seed(runs: pd.DataFrame) -> None:
    """The mutant: with the seeds of one arm exchanged, p is another."""
    exchanged = runs.copy()
    of_paper = exchanged["init.scaling"] == "paper"
    exchanged.loc[of_paper, "seed"] = exchanged.loc[of_paper, "seed"].map({0: 1, 1: 2, 2: 0})
    found = compared(exchanged, allow=["order"]).loc["paper", "p"]
    assert found == pytest.approx(stats.ttest_rel(np.roll(PAPER, 1), EXACT).pvalue)
    assert found > 2 * compared(runs).loc["paper", "p"]


def test_verdicts(tmp_path: Path) -> None:
    ends = {
        "exact": [3.0, 3.1, 2.9],
        "paper": [2.8, 2.9, 2.71],
        "none": [3.001, 3.1, 2.901],
        "1.5": [3.3, 3.41, 3.19],
        "2.5": [2.6, 3.3, 3.0],
    }
    frame = load_runs(write_arms(tmp_path, ends))
    verdicts = {"paper": "lower", "none": "same", "1.5": "higher", "2.5": "underpowered"}
    assert compared(frame)["verdict"].to_dict() == verdicts
    assert compared(frame, smallest_percent=0.01)["verdict"]["none"] == "underpowered"
    assert compared(frame, smallest_percent=100)["verdict"]["2.5"] == "same"


def test_one_seed_is_underpowered(tmp_path: Path) -> None:
    found = compared(load_runs(write_arms(tmp_path, {"exact": [3.0], "paper": [1.0]}))).loc["paper"]
    assert (found["pairs"], found["difference"], found["verdict"]) == (1, -2.0, "underpowered")
    assert np.isnan(found["low"])


def test_seeds_in_one_arm_alone_do_not_count(tmp_path: Path) -> None:
    found = compared(load_runs(write_arms(tmp_path, {"exact": [3.0, 3.1], "paper": [2.8, 2.9, 9.0]}))).loc["paper"]
    assert (found["pairs"], found["unpaired"], found["value"]) == (2, 1, pytest.approx(2.85))


def test_arms_by_several_options_and_by_numbers(tmp_path: Path) -> None:
    for clip in (0.5, 1.0):
        for scaling in ("exact", "paper"):
            changes = (f"init.scaling={scaling}", f"optim.clip={clip}")
            write_run(tmp_path / f"{scaling}{clip}", (4.0, 3.0), changes=changes)
    frame = load_runs(tmp_path)
    found = compare(frame, arms=["init.scaling", "optim.clip"], baseline=("exact", 1.0))
    assert found["arm"].tolist() == ["exact, 0.5", "paper, 0.5", "paper, 1"]
    half = frame[frame["init.scaling"] == "exact"]
    assert compare(half, arms="optim.clip", baseline=1)["arm"].tolist() == ["0.5"]


def test_a_metric_is_reduced_as_the_schema_says(runs: pd.DataFrame) -> None:
    """Step time is a mean over the run, a loss its last value."""
    frame = runs.assign(**{"train/step_seconds": runs["step"] + 1.0, "val/loss": runs["step"] + 1.0})
    assert compared(frame, metric="train/step_seconds")["value"].tolist() == [2.0, 2.0]
    assert compared(frame, metric="val/loss")["value"].tolist() == [3.0, 3.0]


@pytest.mark.parametrize(
    ("facts", "what"),
    [({"data_hash": "e" * 64}, "data"), ({"order_hash": "e" * 64}, "order"), ({"source_sha256": {"f": "e"}}, "source")],
)
def test_arms_that_differ_are_refused_unless_told(tmp_path: Path, facts: dict[str, object], what: str) -> None:
    write_arms(tmp_path, {"exact": EXACT})
    write_arms(tmp_path, {"paper": PAPER}, **facts)
    frame = load_runs(tmp_path)
    with pytest.raises(RecordError, match=f"paper and exact cannot be compared: their {what} differ") as error:
        compared(frame)
    assert f"allow=['{what}']" in str(error.value)
    assert compared(frame, allow=[what])["differs"]["paper"] == what


def test_a_pair_that_differs_is_enough(tmp_path: Path) -> None:
    write_arms(tmp_path, {"exact": EXACT, "paper": PAPER[:2]})
    write_run(tmp_path / "odd", (4.0, 3.5, 2.7), changes=("init.scaling=paper",), seed=2, facts={"data_hash": "e"})
    with pytest.raises(RecordError, match="their data differ"):
        compared(load_runs(tmp_path))


def test_a_scratch_arm_has_no_source(tmp_path: Path) -> None:
    write_run(tmp_path / "a", (4.0, 3.0))
    write_run(tmp_path / "b", (4.0, 3.0), changes=("model=scratch",))
    frame = load_runs(tmp_path)
    with pytest.raises(RecordError, match="their source differ"):
        compare(frame, arms="model", baseline="upcycle")
    assert compare(frame, arms="model", baseline="upcycle", allow=["source"])["differs"].tolist() == ["source"]


@pytest.mark.parametrize(
    ("steps", "flops_per_step", "equal"),
    [(2, 1000, "tokens, FLOPs"), (2, 2500, "tokens"), (1, 2000, "FLOPs"), (1, 3400, "FLOPs"), (1, 1000, None)],
)
def test_budgets_are_equal_in_tokens_or_in_flops(
    tmp_path: Path, steps: int, flops_per_step: int, equal: str | None
) -> None:
    """Against 2 steps of 1,000 FLOPs. Budgets are rounded to whole steps; a run that is one step short is not equal."""
    write_run(tmp_path / "a", (4.0, 3.5, 3.0))
    losses = (4.0, 3.5, 3.0)[: steps + 1]
    write_run(tmp_path / "b", losses, changes=("init.scaling=paper",), facts={"flops_per_step": flops_per_step})
    frame = load_runs(tmp_path)
    if equal:
        assert compared(frame)["equal"]["paper"] == equal
        return
    with pytest.raises(RecordError, match="their budget differ"):
        compared(frame)
    found = compared(frame, allow=["budget"]).loc["paper"]
    assert (found["equal"], found["differs"]) == ("", "budget")


def test_what_cannot_be_compared(runs: pd.DataFrame, tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"did you mean init\.scaling"):
        compared(runs, arms="init.scalings")
    with pytest.raises(RecordError, match="did you mean val/loss"):
        compared(runs, metric="val/los")
    with pytest.raises(RecordError, match="did you mean exact"):
        compared(runs, baseline="exakt")
    with pytest.raises(RecordError, match="did you mean order"):
        compared(runs, allow=["orders"])
    with pytest.raises(RecordError, match="never measured moe/max_vio"):
        compared(runs, metric="moe/max_vio")
    with pytest.raises(RecordError, match="several runs have the same arm and seed"):
        compared(runs, arms="model", baseline="upcycle")
    with pytest.raises(RecordError, match="shares no seed"):
        compared(
            runs[(runs["init.scaling"] != "paper") | (runs["seed"] == 1)].query(
                "seed != 1 or `init.scaling` == 'paper'"
            )
        )


def test_gap_closure_by_hand(runs: pd.DataFrame) -> None:
    found = gap_closure(runs, arms="init.scaling", baseline="exact", reference="paper").set_index("arm").loc["none"]
    gap, gained = np.mean(EXACT) - np.mean(PAPER), np.mean(EXACT) - np.mean(NONE)
    assert found["closure"] == pytest.approx(gained / gap)
    assert found["low"] < found["closure"] < found["high"]


def test_gap_closure_is_0_at_the_baseline_and_1_at_the_reference(tmp_path: Path) -> None:
    ends = {"exact": EXACT, "paper": PAPER, "none": EXACT, "2.5": PAPER}
    frame = load_runs(write_arms(tmp_path, ends))
    found = gap_closure(frame, arms="init.scaling", baseline="exact", reference="paper").set_index("arm")
    assert found.loc["none", ["closure", "low", "high"]].tolist() == pytest.approx([0, 0, 0], abs=1e-7)
    assert found.loc["2.5", ["closure", "low", "high"]].tolist() == pytest.approx([1, 1, 1], abs=1e-6)


def test_gap_closure_refuses_what_compare_refuses(tmp_path: Path) -> None:
    write_arms(tmp_path, {"exact": EXACT, "none": NONE})
    write_arms(tmp_path, {"paper": PAPER}, data_hash="e")
    frame = load_runs(tmp_path)
    with pytest.raises(RecordError, match="their data differ"):
        gap_closure(frame, arms="init.scaling", baseline="exact", reference="paper")
    with pytest.raises(RecordError, match="did you mean paper"):
        gap_closure(frame, arms="init.scaling", baseline="exact", reference="papers")


@pytest.mark.parametrize("status", ["interrupted", "running", "failed", None])
def test_runs_that_have_not_finished_are_refused_unless_told(tmp_path: Path, status: str | None) -> None:
    """Even where they have come as far as the others."""
    write_arms(tmp_path, {"exact": EXACT, "none": NONE, "paper": PAPER[:2]})
    last = write_run(
        tmp_path / "odd", (4.0, 3.5, PAPER[2]), changes=("init.scaling=paper",), seed=2, facts={"status": status}
    )
    frame = load_runs(tmp_path)
    asked = {"arms": "init.scaling", "baseline": "exact"}
    for ask in (compare, partial(gap_closure, reference="none"), iso_loss_saving):
        with pytest.raises(RecordError, match="runs have not finished") as error:
            ask(frame, **asked)
        assert f"{last} ({status or 'null'})" in str(error.value)
        assert "allow=['status']" in str(error.value)
        assert ask(frame, **asked, allow=["status"])["pairs"].max() == 3
        assert ask(frame[frame["status"] == "finished"], **asked)["pairs"].min() == 2
