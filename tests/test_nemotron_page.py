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
