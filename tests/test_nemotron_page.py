"""docs/nemotron.md: every command runs, and the table is what the planner counts."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from documents import between, commands
from published_hybrids import CONFIGS

from upcycle.analysis.prose import interval
from upcycle.analysis.questions import load_sweep
from upcycle.cli.app import main

if TYPE_CHECKING:
    from collections.abc import Callable

    from cli import Outcome

pytest_plugins = ["tiny"]
ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs/nemotron.md").read_text()


def row(name: str, plan: dict[str, dict[str, int]]) -> str:
    if "sizes" not in plan:
        dense = f"{plan['cost']['dense_parameters']:,}"
        return f"| {name} | {dense} | {dense} | |"
    sizes = plan["sizes"]
    trunk = sizes["parameters"] - sizes["ahead_parameters"]
    cache = f"{sizes['cache_bytes_per_token']:,} + {sizes['cache_bytes_per_sequence']:,}"
    with_ahead = (
        f" (with them {sizes['parameters']:,}, {sizes['tensors']:,} tensors)" if sizes["ahead_parameters"] else ""
    )
    return f"| {name} | {trunk:,}{with_ahead} | {sizes['active_parameters']:,} | {cache} |"


def test_the_table_is_what_the_planner_counts(upcycle: Callable[..., Outcome], tmp_path: Path) -> None:
    lines = ["| model | parameters | active | cache, bytes |", "|---|---|---|---|"]
    for name, config in CONFIGS.items():
        (tmp_path / "config.json").write_text(json.dumps(config))
        shown = upcycle(
            "plan", f"source={tmp_path}", "format=json", "moe.expansion=2", "moe.granularity=1", "moe.top_k=2"
        )
        lines.append(row(name, json.loads(shown.out)))
    assert between(TEXT, "counts").splitlines() == lines, "\n".join(lines)


def measured(sweep: str, metric: str, baseline: str, arms: tuple[str, ...]) -> list[str]:
    """What the committed records say of a sweep's arms: pairs of seeds, the mean difference, and its interval."""
    loaded = load_sweep(ROOT / "analysis/results/laptop", sweep)
    lines = [f"| `{metric}` | nats/byte | over {baseline} | 95 % interval | pairs |", "|---|---|---|---|---|"]
    for number, arm in enumerate(arms):
        allow = ["source"] if "scratch" in arm else []
        found = loaded.only(arm, baseline).compare(baseline, metric=metric, allow=allow).iloc[0]
        if not number:
            lines.append(f"| {baseline} | {found['baseline']:.4f} | | | |")
        said = interval(found["percent_low"], found["percent_high"])
        lines.append(f"| {arm} | {found['value']:.4f} | {found['percent']:+.2f} % | {said} | {found['pairs']} |")
    return lines


def test_upcycled_hybrids_are_as_measured() -> None:
    arms = ("E8G1T2", "E8G4T8", "E8G4T8, shared third", "E8G4T8, scratch")
    lines = measured("hybrid", "val/loss", "dense", arms)
    assert between(TEXT, "hybrid").splitlines() == lines, "\n".join(lines)


def test_multi_token_prediction_is_as_measured() -> None:
    lines = [line for metric in ("val/mtp_loss", "val/loss") for line in measured("mtp", metric, "random", ("copy",))]
    assert between(TEXT, "mtp").splitlines() == [*lines[:4], "", *lines[4:]], "\n".join(lines)


@pytest.mark.slow
def test_commands_run(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, in a directory with the repository's models and examples, with shorter training."""
    for name in ("models", "examples"):
        (work / name).symlink_to(ROOT / name)
    for line in commands(TEXT):
        program, *words = shlex.split(line.replace("budget.flops=1e11", "budget.flops=2e10"))
        assert program == "upcycle", line
        monkeypatch.setattr(sys, "argv", [program, *words])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code, line
    report = json.loads((work / "hybrid-moe/equivalence.json").read_text())
    assert report["passed"]
    assert abs(report["loss_gap"]) < 1e-5
