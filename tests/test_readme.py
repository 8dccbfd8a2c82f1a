"""Every command and every piece of Python in the README runs, and its numbers are the measured ones."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from documents import between, blocks, commands

from upcycle.analysis.prose import interval
from upcycle.analysis.questions import load_sweep

if TYPE_CHECKING:
    from collections.abc import Callable

    from cli import Outcome

pytest_plugins = ("text_model", "tiny")
ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
HUB_ID = "HuggingFaceTB/SmolLM2-135M"


@pytest.mark.slow
def test_upcycle_commands_and_python_run(text_model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In a copy of the repository's root, on a tiny model instead of the Hub's, and for three steps of training."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").symlink_to(ROOT / "models")
    for file in ROOT.glob("*.md"):
        shutil.copy(file, tmp_path)
    shorter = {
        HUB_ID: str(text_model),
        "budget.flops=1e13": "budget.flops=3e10",
        "budget.tokens=4e6": "budget.tokens=12e3",
    }
    executable = str(Path(sys.executable).with_name("upcycle"))
    for line in commands(README):
        for given, replacement in shorter.items():
            line = line.replace(given, replacement)
        words = shlex.split(line)
        if words[0] == "upcycle":
            ended = subprocess.run([executable, *words[1:]], capture_output=True, text=True, check=False)
            assert ended.returncode == 0, f"{line}\n{ended.stdout}\n{ended.stderr}"
        else:
            assert line in ("make demo", "make test", "make bench"), line
    for code in blocks(README, "python"):
        exec(compile(code, "README.md", "exec"), {})


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make ([a-z-]+)", README):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_options_named_in_the_readme_exist(upcycle: Callable[..., Outcome]) -> None:
    shown = upcycle("convert", "--help").out
    training = upcycle("train", "--help").out
    for option in set(re.findall(r"`((?:moe|init)\.[a-z_]+)", README)):
        assert re.search(rf"^ +{option.split('.')[1]}:", shown, flags=re.MULTILINE), option
    for option in set(re.findall(r"`((?:budget|distill|router|balance)\.[a-z_]+)", README)):
        assert re.search(rf"^ +{option.split('.')[1]}:", training, flags=re.MULTILINE), option


def shown_rows(marker: str) -> dict[str, str]:
    """Lines of a table by what their first cell quotes."""
    lines = between(README, marker).splitlines()
    return {line.split("|")[1].strip().strip("`"): line for line in lines if line.startswith("| `")}


def test_the_results_are_the_measured_ones() -> None:
    rows = json.loads((ROOT / "analysis/results/step0.json").read_text())["rows"]
    shown = shown_rows("results")
    measured = {row["case"]: row for row in rows}
    assert shown
    for case, line in shown.items():
        row = measured[case]
        assert f"{row['moe_loss']:.4f}" in line
        assert f"{100 * row['loss_gap']:+.3f} %" in line


def test_the_first_steps_are_the_measured_ones() -> None:
    rows = json.loads((ROOT / "benchmarks/results/start_lasts.json").read_text())["rows"]
    measured = {row["arm"]: row["loss"] for row in rows}
    shown = shown_rows("lasting")
    assert len(shown) > 5
    for arm, line in shown.items():
        losses = " | ".join(f"{measured[arm][step]:.4f}" for step in ("0", "10", "20", "40", "60"))
        assert f"| {losses} |" in line


def compared(line: str) -> tuple[str, str, str]:
    """Sweep, arm and baseline of a line of the headline."""
    name, _, flops = line.rpartition(", ")
    if name.startswith("E8G8T8"):
        return "groups", f"G8T8 softmax_topk {'positions' if name.endswith('by position') else 'free'}", "dense"
    if name == "E8G1T1":
        return "budget", f"model=upcycle flops={flops}", f"model=dense flops={flops}"
    arm = "finer recipe" if name.startswith("finer") else "recipe"
    return "recipe_confirmed", arm, "dense, 2 x peak" if "2 x peak" in name else "dense"


def test_the_headline_is_the_measured_one() -> None:
    shown = shown_rows("headline")
    assert len(shown) == 8
    for name, line in shown.items():
        sweep, arm, baseline = compared(name)
        found = load_sweep(ROOT / "analysis/results/laptop", sweep).only(arm, baseline).compare(baseline).iloc[0]
        assert found["pairs"] == 5
        numbers = f"{found['baseline']:.4f} | {found['value']:.4f} | {found['percent']:+.2f} %"
        assert f"{numbers} | {interval(found['percent_low'], found['percent_high'])} |" in line
    percent = float(re.search(r"([-+][\d.]+) %", shown["finer recipe, 1.2e+13"])[1])  # type: ignore[index]
    assert f"by {-percent:.1f} %, at equal training FLOPs" in README


def test_pictures_are_there() -> None:
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / picture).is_file(), picture
