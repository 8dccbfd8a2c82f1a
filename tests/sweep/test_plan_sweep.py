"""What is wrong with a sweep is said before anything starts; and what it will take."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
import questions

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from cli import Outcome

    Upcycle = Callable[..., Outcome]

pytest_plugins = ("text_model", "tiny")
LISTS = ("plan-sweep",), ("train", "-m")


def test_counts(upcycle: Upcycle, text: Path, tmp_path: Path) -> None:
    """Steps and FLOPs are those that the runs then record (test_run_sweep.py)."""
    planned = upcycle("plan-sweep", *questions.shipped("layers", text), f"output={tmp_path}")
    assert planned.status == 0, planned.err
    assert "3 runs (3 arms, seeds 0), 0 finished" in planned.out
    rows = re.findall(r"^ +\S+ +qwen2_moe .* ([\d.e+]+) +\d+ s *$", planned.out, flags=re.MULTILINE)
    assert len(rows) == 3
    totals = re.findall(r"^left: (\S+) FLOPs, (\d+) s .* at (\S+) FLOP/s", planned.out, flags=re.MULTILINE)
    ((flops, seconds, rate),) = totals
    assert float(flops) == pytest.approx(sum(map(float, rows)), rel=0.01)
    assert float(seconds) == pytest.approx(float(flops) / float(rate), abs=1)
    assert "arXiv 2212.05055" in planned.out
    assert "conflict" not in planned.out


def test_a_full_disk_is_a_conflict_and_nothing_starts(
    upcycle: Upcycle, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("upcycle.sweep.command.free_bytes", lambda _output: 1000)
    given = (*questions.shipped("layers", text), f"output={tmp_path / 'runs'}")
    planned = upcycle("plan-sweep", *given)
    assert planned.status == 1
    assert "conflict: too little space" in planned.out
    upcycle("train", "-m", *given).refused("too little space for the checkpoints", found="0.00 GB free")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("command", LISTS, ids=" ".join)
def test_every_invalid_arm_is_listed_and_nothing_starts(
    command: tuple[str, ...], upcycle: Upcycle, text: Path, tmp_path: Path
) -> None:
    arms = {
        "good": [],
        "broken groups": ["moe.top_k=3"],
        "no such init": ["init=magic"],
        "routing": ["router.capacity_factor=-1"],
        "unknown": ["balance.aux=1"],
        "too short": ["budget.flops=1"],
        "no source": ["source=nowhere"],
        "seed": ["seed=3"],
    }
    mine = questions.own(tmp_path / "mine", sweep={"arms": arms})
    output = tmp_path / "runs"
    refused = upcycle(*command, *mine, *questions.shipped("mine", text), f"output={output}")
    refused.refused("7 of 8 arms are not valid, and nothing was started")
    for name in arms:
        assert (f"\n  {name}: " in refused.err) is (name != "good")
    reasons = ("multiple of granularity", "magic", "capacity_factor", "balance.aux", "less than one step", "nowhere")
    for said in (*reasons, "seed=3"):
        assert said in refused.err
    assert not output.exists()


@pytest.mark.parametrize(
    "sweep",
    [
        {"vary": {"moe.top_k": [2]}},
        {"arms": {"one": ["init=copy", "moe.top_k=4"], "two": ["moe.top_k=4", "init=copy"]}},
    ],
)
def test_identical_arms(sweep: dict[str, Any], upcycle: Upcycle, text: Path, tmp_path: Path) -> None:
    mine = questions.own(tmp_path, sweep=sweep)
    names = "baseline = top_k=2" if "vary" in sweep else "one = two"
    upcycle("plan-sweep", *mine, *questions.shipped("mine", text)).refused("arms are identical", found=names)


def test_arms_that_differ_in_the_seed_alone(upcycle: Upcycle, text: Path, tmp_path: Path) -> None:
    """They would share the directories of `sweep.seeds`."""
    mine = questions.own(tmp_path, sweep={"vary": {"seed": [1, 2]}})
    refused = upcycle("plan-sweep", *mine, *questions.shipped("mine", text))
    refused.refused("2 of 3 arms are not valid", "an arm sets the seed")


def test_an_unknown_sweep(upcycle: Upcycle) -> None:
    for command in LISTS:
        upcycle(*command, "+sweeps=router_ordr", "scale=smoke", "output=x").refused(
            "unknown value for sweeps", found="router_ordr", remedy="did you mean router_order"
        )


def test_what_a_sweep_needs(upcycle: Upcycle, text: Path, tmp_path: Path) -> None:
    upcycle("plan-sweep", "scale=smoke").refused("there is no sweep")
    upcycle("plan-sweep", "+sweeps=layers", "source=x").refused("a sweep needs a scale")
    upcycle("plan-sweep", "+sweeps=layers", "scale=laptp").refused("unknown value for scale", remedy="laptop")
    upcycle("train", "-m", *questions.shipped("layers", text)).refused("a required option is missing")
    upcycle("plan-sweep", *questions.shipped("layers", text), "hydra/launcher=nowhere").refused(
        "unknown value for hydra/launcher", found="nowhere"
    )
    upcycle("train", *questions.shipped("layers", text), "output=x").refused("for a multirun", remedy="add -m")
    mine = questions.own(tmp_path, sweep={"vary": {"moe.top_k": [4]}, "metric": "val/los"})
    upcycle("plan-sweep", *mine, *questions.shipped("mine", text)).refused("sweep.metric is not a metric")
    mine = questions.own(tmp_path, sweep={"vary": {"moe.top_k": [4]}, "seed": [0]})
    upcycle("plan-sweep", *mine, *questions.shipped("mine", text)).refused("unknown option", found="seed")


def test_a_scale_is_for_single_runs_too(upcycle: Upcycle) -> None:
    composed = upcycle("train", "scale=laptop", "model=dense", "output=x", "--cfg", "job")
    assert "sequence_length: 256\n" in composed.out
