"""The notebooks of analysis/ run to their end, say what their records say, and come out the same every time."""

from __future__ import annotations

import base64
import functools
import json
import os
import random
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from omegaconf import OmegaConf
from smoke_runs import run_sweep
from written_sweeps import write_sweep

from upcycle.analysis.prose import NOT_RUN, answer
from upcycle.analysis.questions import load_sweep

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytest_plugins = ("text_model",)
ROOT = Path(__file__).parent.parent.parent
RENDER = ROOT / "analysis/render.py"
NOTEBOOKS = {file.stem: file.read_text() for file in (ROOT / "analysis").glob("*.py") if file != RENDER}
SWEEPS = {name: re.findall(r'load_sweep\(RECORDS, "(\w+)"\)', text) for name, text in NOTEBOOKS.items()}
OF_SWEEPS = sorted(name for name, sweeps in SWEEPS.items() if sweeps)
LARGEST = 500_000  # bytes of a rendered notebook
QUICK = "initialization_and_scaling"
# For real; at least one of each notebook.
RUN = ("layers", "balance_statistics", "egt", "budget", "recipe_confirmed", "mtp")


def ending(arm: str, seed: int) -> float:
    """An arm's own loss, a seed's own, and a little of both."""
    own = random.Random(arm)
    return 1.2 + own.uniform(-0.03, 0.03) + 0.02 * seed + random.Random(f"{arm} {seed}").gauss(0, 0.001)


@pytest.fixture(scope="session")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every sweep that a notebook looks at, with three seeds."""
    root = tmp_path_factory.mktemp("records")
    for name in sorted({each for sweeps in SWEEPS.values() for each in sweeps}):
        write_sweep(root, name, end=ending)
    return root


def shipped(sweep: str) -> Any:
    return OmegaConf.load(ROOT / f"sweeps/{sweep}.yaml")


def source_of(sweep: str) -> str:
    """The shipped model that it is about."""
    return str(shipped(sweep).get("source", "models/stdlib-250k"))


@pytest.fixture(scope="session")
def smoke(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of real runs at scale=smoke, of some sweeps; the others were not run."""
    output = tmp_path_factory.mktemp("smoke")
    data = ["data=text", f"data.files='{text}/*.txt'", "data.held_out=2"]
    for name in RUN:
        own = ["budget.flops=null", "budget.steps=2"] if "budget" in shipped(name) else []  # not the scale's
        run_sweep(name, output, [*data, f"source={ROOT / source_of(name)}", "sweep.seeds=[0,1]", *own])
    return output


def render(name: str, output: Path, **environment: str) -> dict[str, Any]:
    """Render as `make notebooks` does."""
    ended = subprocess.run(
        [sys.executable, str(RENDER), "--output", str(output), name],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    file = output / f"rendered/{name}.ipynb"
    assert file.stat().st_size < LARGEST
    notebook: dict[str, Any] = json.loads(file.read_text())
    return notebook


@pytest.fixture(scope="session")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `rendered` writes."""
    return tmp_path_factory.mktemp("rendered")


@pytest.fixture(scope="session")
def rendered(records: Path, output: Path) -> Callable[[str], dict[str, Any]]:
    """Returns a notebook on those records, rendered on first use."""
    return functools.cache(lambda name: render(name, output, UPCYCLE_RECORDS=str(records)))


def outputs(notebook: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for cell in notebook["cells"]:
        yield from cell.get("outputs", [])


def words(notebook: dict[str, Any]) -> list[str]:
    """What its cells say."""
    return ["".join(each["data"]["text/markdown"]) for each in outputs(notebook) if "text/markdown" in each["data"]]


def check_clean(notebook: dict[str, Any]) -> None:
    """Nothing but figures, words and tables: no warnings, no values that nobody asked for."""
    for each in outputs(notebook):
        assert each["output_type"] in ("execute_result", "display_data"), each
        assert {"image/png", "text/markdown", "text/html"} & each["data"].keys(), each
    assert any("image/png" in each["data"] for each in outputs(notebook))


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n == QUICK else pytest.mark.slow) for n in OF_SWEEPS])
def test_a_notebook_on_complete_records(name: str, records: Path, rendered: Callable[[str], dict[str, Any]]) -> None:
    """Every sweep's question is answered, and every claim is about arms that there are."""
    notebook = rendered(name)
    check_clean(notebook)
    said = words(notebook)
    for sweep in SWEEPS[name]:
        question = load_sweep(records, sweep).question
        assert any(question in each and "| hardware |" in each for each in said)
    text = "\n".join(said)
    assert "Expected outcomes: " in text
    for absent in ("not measured", NOT_RUN, "Nothing can be said yet", "**Missing.**"):
        assert absent not in text


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_SWEEPS)
def test_a_notebook_on_runs_at_smoke_scale(name: str, smoke: Path, tmp_path: Path) -> None:
    """Sweeps that ran are answered; of the others there is the question, and what makes their records."""
    notebook = render(name, tmp_path, UPCYCLE_RECORDS=str(smoke))
    check_clean(notebook)
    text = "\n".join(words(notebook))
    assert set(SWEEPS[name]) & set(RUN)
    for sweep in SWEEPS[name]:
        loaded = load_sweep(smoke, sweep)
        assert " ".join(loaded.question.split()) in text
        command = f"{NOT_RUN} No run has finished; `upcycle train -m +sweeps={sweep} scale=laptop output=DIR` makes"
        assert (command in text) is (sweep not in RUN)
        if sweep in RUN:
            arms = len(loaded.arms)
            assert f"{2 * arms} of {arms} arms; seeds 0, 1" in text
    assert any(source_of(sweep) in text for sweep in set(SWEEPS[name]) & set(RUN))
    for absent in ("not measured", "Nothing can be said yet", "**Missing.**"):
        assert absent not in text
    for cell, following in pairwise(notebook["cells"]):
        if any(NOT_RUN in each for each in words({"cells": [cell]})):
            assert "".join(following["source"]).startswith("#")


def test_the_words_are_those_of_the_records(records: Path, rendered: Callable[[str], dict[str, Any]]) -> None:
    assert answer(load_sweep(records, "initialization").compare("virtual_group")) in words(rendered(QUICK))


def test_the_page_has_every_word_and_figure(output: Path, rendered: Callable[[str], dict[str, Any]]) -> None:
    notebook = rendered(QUICK)
    page = (output / f"results/{QUICK}.md").read_text()
    assert all(each in page for each in words(notebook))
    pictures = [
        base64.b64decode(each["data"]["image/png"]) for each in outputs(notebook) if "image/png" in each["data"]
    ]
    linked = re.findall(r"\((figures/.*?)\)", page)
    assert [(output / "results" / each).read_bytes() for each in linked] == pictures
    assert "load_sweep" not in page


@pytest.mark.slow
def test_other_records_give_other_words(rendered: Callable[[str], dict[str, Any]], tmp_path: Path) -> None:
    """No outcome is written into the notebook."""
    write_sweep(tmp_path, "initialization", end=lambda arm, seed: ending(arm, seed) - 0.2 * (arm == "random"))
    told = words(rendered(QUICK)), words(render(QUICK, tmp_path, UPCYCLE_RECORDS=str(tmp_path)))
    claim = "random experts end higher than virtual groups"
    before, after = (next(line for each in said for line in each.splitlines() if claim in line) for said in told)
    assert "**disagrees**" in after
    assert before != after


@pytest.mark.slow
def test_the_same_records_give_the_same_file(
    records: Path, rendered: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    assert render(QUICK, tmp_path, UPCYCLE_RECORDS=str(records)) == rendered(QUICK)


@pytest.mark.slow
def test_specialisation(tmp_path: Path) -> None:
    """It trains what it needs, and does not train again."""
    given = {"UPCYCLE_SCALE": "smoke", "UPCYCLE_SEEDS": "1", "UPCYCLE_RUNS": str(tmp_path / "runs")}
    notebook = render("specialisation", tmp_path, **given)
    check_clean(notebook)
    said = "\n".join(words(notebook))
    assert "smoke: 5 steps" in said
    for arm in ("micro_batch", "global_batch"):
        for layer in (0, 1):
            assert f"| {arm} | {layer} |" in said
    assert "**more**" not in said  # one seed decides nothing
    before = (tmp_path / "runs/micro_batch-0/metrics.jsonl").read_text()
    render("specialisation", tmp_path, **given)
    assert (tmp_path / "runs/micro_batch-0/metrics.jsonl").read_text() == before
