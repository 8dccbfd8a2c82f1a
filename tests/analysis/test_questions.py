"""Sweeps as questions: what is loaded, what is missing, how claims are held against it, and the words about it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import pytest
from written_sweeps import START, write_sweep

from upcycle.analysis import compare, draw_comparison, draw_curves, draw_frontier, frontier, iso_loss_saving
from upcycle.analysis.prose import NOT_RUN, answer, introduction, judgement, table
from upcycle.analysis.questions import Claim, judge, load_sweep
from upcycle.errors import RecordError, SourceError
from upcycle.sweep.config import PackConfig
from upcycle.sweep.pack import pack
from upcycle.tracking.status import NOT_STARTED

if TYPE_CHECKING:
    from upcycle.analysis.questions import Expected, Sweep

BASELINE, HALF, FIRST = "baseline", "layers=every_2", "layers=[0]"
ENDS = {BASELINE: 1.2, HALF: 1.26, FIRST: 1.2005}
NOISE = (0.0, 0.004, -0.002)


def end(arm: str, seed: int) -> float:
    return ENDS[arm] + 0.05 * seed + NOISE[seed] * (arm != BASELINE)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("records")
    write_sweep(root, "layers", end=end, unfinished=[(FIRST, 2)])
    write_sweep(root, "capacity", end=lambda _arm, seed: 1.3 + 0.05 * seed)
    return root


@pytest.fixture
def layers(directory: Path) -> Sweep:
    return load_sweep(directory, "layers")


def test_finished_runs_have_their_arm(layers: Sweep) -> None:
    assert layers.arms == tuple(ENDS)
    assert layers.question == "Do all layers have to become mixtures of experts?"
    ends = layers.runs.groupby("run", observed=True).tail(1)
    assert dict(zip(zip(ends["arm"], ends["seed"], strict=True), ends["val/loss"], strict=True)) == {
        (arm, seed): end(arm, seed) for arm in ENDS for seed in range(3) if (arm, seed) != (FIRST, 2)
    }
    assert set(layers.records) == set(ends["run"])


def test_what_is_missing_is_named(layers: Sweep, directory: Path, tmp_path: Path) -> None:
    assert layers.missing.to_dict("records") == [{"arm": FIRST, "seed": 2, "status": "failed"}]
    assert "have not finished and do not count: 1. `layers=[0]` (seed 2 failed)." in introduction(layers)
    index = directory / "layers.json"
    (tmp_path / "layers.json").write_text(index.read_text())
    started = load_sweep(tmp_path, "layers")
    assert started.runs.empty
    assert set(started.missing["status"]) == {NOT_STARTED}
    assert "`baseline` (seed 0, 1, 2 not started), `layers=every_2`" in introduction(started)


def test_packed_runs_are_the_same(layers: Sweep, directory: Path, tmp_path: Path) -> None:
    place = Path(shutil.copytree(directory, tmp_path / "runs"))
    pack(PackConfig(runs=str(place), name="layers"))
    assert not (place / "layers-0-0").exists()
    packed = load_sweep(place, "layers")
    pd.testing.assert_frame_equal(packed.missing, layers.missing)
    pd.testing.assert_frame_equal(packed.runs.drop(columns="run"), layers.runs.drop(columns="run"))
    assert list(packed.records.values()) == list(layers.records.values())
    assert set(packed.records) == {str(place / Path(run).name) for run in layers.records}


def test_damaged_records_are_named(tmp_path: Path) -> None:
    arms = write_sweep(tmp_path, "layers", end=end)
    run = tmp_path / f"layers-{arms.index(HALF)}-1" / "run.json"
    run.write_text(json.dumps({name: value for name, value in json.loads(run.read_text()).items() if name != "status"}))
    missing = load_sweep(tmp_path, "layers").missing
    assert missing.to_dict("records") == [{"arm": HALF, "seed": 1, "status": NOT_STARTED}]
    run.write_text("[]")
    with pytest.raises(SourceError, match=r"run\.json is not"):
        load_sweep(tmp_path, "layers")
    (tmp_path / "layers.json").write_text("{")
    with pytest.raises(RecordError, match="the index of the sweep is damaged"):
        load_sweep(tmp_path, "layers")


def test_a_sweep_that_was_not_started_has_its_question(tmp_path: Path) -> None:
    """And everything that a notebook does with it goes through, and says that there is nothing yet."""
    sweep = load_sweep(tmp_path, "layers")
    assert (sweep.arms, len(sweep.runs), len(sweep.missing)) == ((), 0, 0)
    assert "**Hypothesis.** Every second layer keeps" in introduction(sweep)
    assert f"{NOT_RUN} No run has finished; `upcycle train -m +sweeps=layers" in introduction(sweep)
    compared = sweep.only(BASELINE, HALF).called("all", "half").compare("all")
    assert answer(compared).startswith("Nothing can be said yet")
    for figure in (draw_comparison(compared), draw_curves(sweep.runs, arms="arm")):
        figure.draw_without_rendering()
    draw_frontier(frontier(sweep.beside(sweep).runs, arms="arm")).draw_without_rendering()
    assert sweep.saving(BASELINE, sunk_flops=0).empty
    claim = Claim(source="x", says="y", arm=HALF, baseline=BASELINE, expected="same")
    assert judge(sweep, [claim])["outcome"].tolist() == ["not measured"]
    assert "not measured 1." in judgement(judge(sweep, [claim]))


def test_no_such_sweep(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="did you mean layers"):
        load_sweep(directory, "layrs")
    with pytest.raises(RecordError, match="no such directory"):
        load_sweep(tmp_path / "nowhere", "layers")


def test_comparisons_are_those_of_compare_in_the_files_order(layers: Sweep) -> None:
    found = layers.compare(BASELINE)
    expected = compare(layers.runs, arms="arm", baseline=BASELINE).set_index("arm").loc[[HALF, FIRST]].reset_index()
    pd.testing.assert_frame_equal(found, expected, check_like=True)
    assert found["pairs"].tolist() == [3, 2]
    assert found["verdict"].tolist() == ["higher", "underpowered"]
    saved = iso_loss_saving(layers.runs, arms="arm", baseline=FIRST, sunk_flops=10.0).set_index("arm")
    pd.testing.assert_frame_equal(layers.saving(FIRST, sunk_flops=10.0).set_index("arm"), saved.loc[[BASELINE, HALF]])


def test_the_share_of_a_run_to_look_at(layers: Sweep) -> None:
    """Runs have 4 steps and were validated after 0, 1 and 2 of them."""
    assert layers.compare(BASELINE, until=0)["value"].tolist() == [START, START]
    early = layers.compare(BASELINE, until=0.25)["baseline"].iloc[0]
    assert early == pytest.approx(sum((START + end(BASELINE, seed)) / 2 for seed in range(3)) / 3)


def test_arms_that_share_no_seed_are_left_out(directory: Path, layers: Sweep, tmp_path: Path) -> None:
    arms = write_sweep(tmp_path, "layers", end=end, unfinished=[(BASELINE, 0), (BASELINE, 1), (HALF, 2)])
    sweep = load_sweep(tmp_path, "layers")
    assert sweep.compare(BASELINE)["arm"].tolist() == [FIRST]
    assert sweep.only(BASELINE, HALF).compare(BASELINE).empty
    assert sweep.only(HALF).compare(HALF).empty
    saved = sweep.only(HALF).saving(HALF, sunk_flops=0.0)
    assert saved.empty
    assert list(saved) == list(sweep.saving(BASELINE, sunk_flops=0.0))
    assert list(sweep.only(HALF).records) == [str(tmp_path / f"layers-{arms.index(HALF)}-{seed}") for seed in (0, 1)]


def test_names(layers: Sweep, directory: Path) -> None:
    called = layers.called("all", "half", "first")
    assert called.arms == ("all", "half", "first")
    assert called.missing["arm"].tolist() == ["first"]
    renamed = layers.renamed({HALF: "half"}).compare(BASELINE)
    assert renamed["arm"].tolist() == ["half", FIRST]
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        layers.called("all", "half")
    both = called.beside(load_sweep(directory, "capacity").called("dropless", "1", "2", "4"))
    assert both.arms == ("all", "half", "first", "dropless", "1", "2", "4")
    assert len(both.records) == 8 + 12
    assert both.compare("dropless")["arm"].tolist() == ["all", "half", "first", "1", "2", "4"]


def test_no_gain_is_claimed_of_an_arm_that_gains(layers: Sweep) -> None:
    claim = Claim(source="arXiv", says="so", arm=BASELINE, baseline=HALF, expected="not lower")
    assert judge(layers, [claim])["outcome"].tolist() == ["disagrees"]


@pytest.mark.parametrize(
    ("arm", "expected", "outcome"),
    [
        (HALF, "higher", "agrees"),
        (HALF, "lower", "disagrees"),
        (HALF, "same", "disagrees"),
        (HALF, "not lower", "agrees"),
        (FIRST, "same", "undecided"),
    ],
)
def test_claims(layers: Sweep, arm: str, expected: Expected, outcome: str) -> None:
    claim = Claim(source="arXiv", says="so", arm=arm, baseline=BASELINE, expected=expected)
    judged = judge(layers, [claim])
    assert judged["outcome"].tolist() == [outcome]
    row = layers.compare(BASELINE).set_index("arm").loc[arm]
    assert judged["percent"].tolist() == [row["percent"]]
    said = judgement(judged)
    assert f"{outcome} 1." in said
    assert f"val/loss {row['verdict']}: {row['percent']:+.2f} %" in said


def test_claims_about_another_metric_and_time(layers: Sweep) -> None:
    early = Claim(source="a", says="b", arm=HALF, baseline=BASELINE, expected="same", until=0)
    other = Claim(source="a", says="b", arm=HALF, baseline=BASELINE, expected="higher", metric="moe/max_vio")
    judged = judge(layers, [early, other])
    assert judged["outcome"].tolist() == ["agrees", "agrees"]
    assert "val/loss before the first step same: +0.00 %" in judgement(judged)
    assert "moe/max_vio higher" in judgement(judged)
    with pytest.raises(RecordError, match="did you mean layers=every_2"):
        judge(layers, [Claim(source="a", says="b", arm="layers=every_3", baseline=BASELINE, expected="same")])


def test_the_words_follow_the_records(layers: Sweep, directory: Path) -> None:
    said = introduction(layers)
    for fact in (
        "8 of 3 arms; seeds 0, 1, 2",
        "256 M tokens",
        "2 steps",
        "x86_64, 2 CPUs, 1 threads a run",
        "python 3.11.0, upcycle 0.1.0; commit cccccccccc |",
    ):
        assert fact in said
    dirty = {run: {**record, "git_dirty": True} for run, record in layers.records.items()}
    assert "commit cccccccccc with changes |" in introduction(replace(layers, records=dirty))
    row = layers.compare(BASELINE).iloc[0]
    assert f"| {row['value']:.4f} | {row['percent']:+.2f} % |" in answer(layers.compare(BASELINE))
    assert answer(layers.compare(BASELINE)).startswith(
        "Against the baseline, higher: `layers=every_2`; too few pairs to tell: `layers=[0]`.\n"
    )
    alone = layers.compare(BASELINE).assign(percent_low=float("nan"), p_holm=float("nan"))
    assert "| – | 3 | – |" in answer(alone)
    assert introduction(layers)._repr_markdown_() == said


def test_what_runs_did_not_record_is_said(layers: Sweep) -> None:
    """Away from a repository there is no commit, and pandas holds NaN for it."""
    bare = {"git_commit": None, "hardware": None, "versions": None}
    records = {
        run: {name: value for name, value in (record | bare).items() if value or name == "git_commit"}
        for run, record in layers.records.items()
    }
    runs = layers.runs.assign(git_commit=float("nan"))
    said = introduction(replace(layers, records=records, runs=runs))
    assert "| hardware | not recorded;" in said
    assert "not recorded; commit unknown" in said


def test_what_may_differ_is_said(tmp_path: Path) -> None:
    """A mixture from scratch has no source to share with the dense model."""
    write_sweep(tmp_path, "budget", end=lambda arm, seed: 1.0 + 0.01 * seed + ("scratch" in arm), seeds=(0, 1))
    budget = load_sweep(tmp_path, "budget")
    dense, scratch = budget.arms[0], budget.arms[6]
    part = budget.only(dense, scratch)
    with pytest.raises(RecordError, match="their source differ"):
        part.compare(dense)
    compared = part.compare(dense, allow=["source"])
    assert f"as is meant: `{scratch}` (source)." in answer(compared)
    claim = Claim(source="a", says="b", arm=scratch, baseline=dense, expected="higher", allow=("source",))
    assert judge(part, [claim])["differs"].tolist() == ["source"]
    assert part.saving(dense, sunk_flops=0.0, allow=["source"])["reached"].tolist() == [0]


def test_a_table_keeps_its_cells() -> None:
    assert table(["a"], [["b|c"], [1]]) == "| a |\n| --- |\n| b\\|c |\n| 1 |"


def test_the_index_is_the_sweeps_own(directory: Path) -> None:
    """A run that another sweep made, with the same options, counts for both."""
    index = json.loads((directory / "capacity.json").read_text())
    index["runs"] = {"layers-0-0": {"arm": "shared", "seed": 0, "overrides": []}}
    (directory / "mine.json").write_text(json.dumps(index))
    mine = load_sweep(directory, "mine")
    assert mine.runs["arm"].unique().tolist() == ["shared"]
