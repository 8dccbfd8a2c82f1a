"""The floors of ARCHITECTURE.md, held by every import; and what a room loads, each in a fresh interpreter."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import defaultdict
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "upcycle"
HALL = {"__init__", "errors"}
DATA = {"conf"}

ROOMS = {
    "upcycle": ("torch", "transformers", "hydra", "upcycle.cli.app"),
    "upcycle.errors": ("torch", "transformers", "hydra", "upcycle.options.config"),
    "upcycle.options.config": ("torch", "transformers", "hydra", "upcycle.arch"),
    "upcycle.arch.families": ("torch", "transformers", "upcycle.plan", "upcycle.checkpoint", "upcycle.init"),
    "upcycle.arch.targets": ("torch", "transformers", "upcycle.plan", "upcycle.checkpoint", "upcycle.init"),
    "upcycle.plan.plan": ("torch", "transformers", "upcycle.checkpoint", "upcycle.init", "upcycle.models.source"),
    "upcycle.plan.cost": ("torch", "transformers", "upcycle.checkpoint", "upcycle.init", "upcycle.models.source"),
    "upcycle.init.experts": ("transformers", "upcycle.plan", "upcycle.arch", "upcycle.checkpoint"),
    "upcycle.checkpoint": ("transformers", "gguf", "upcycle.plan", "upcycle.arch", "upcycle.init"),
    "upcycle.files": ("torch", "transformers", "upcycle.checkpoint"),
    "upcycle.tracking.record": ("torch", "transformers", "upcycle.checkpoint", "upcycle.train"),
    "upcycle.analysis": ("torch", "transformers", "upcycle.checkpoint", "upcycle.train"),
    "upcycle.modeling": ("torch", "transformers"),
    "upcycle.convert.materialise": ("transformers", "upcycle.checkpoint", "upcycle.models.source"),
    "upcycle.parallel.planning": (
        "torch",
        "transformers",
        "upcycle.checkpoint",
        "upcycle.models.source",
        "upcycle.train",
    ),
    "upcycle.cli": ("torch", "transformers"),
}


def floors() -> dict[str, int]:
    """The floor of every room, as ARCHITECTURE.md's table has it."""
    rows = re.findall(r"^\| (\d+) \| `(\w+)/` \|", (ROOT / "ARCHITECTURE.md").read_text(), flags=re.MULTILINE)
    return {room: int(floor) for floor, room in rows}


def imports() -> dict[str, set[str]]:
    """The modules of the package that each of them imports, at the top or inside a function."""
    modules = {
        ".".join(("upcycle", *file.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): file
        for file in PACKAGE.rglob("*.py")
    }
    found: dict[str, set[str]] = {module: set() for module in modules}
    for module, file in modules.items():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                found[module] |= {name if name in modules else node.module for name in names} & modules.keys()
            elif isinstance(node, ast.Import):
                found[module] |= {alias.name for alias in node.names} & modules.keys()
    return found


def room(module: str) -> str:
    """The second part of a module's name; the hall's own for what stands there."""
    return (module.split(".") + ["__init__"])[1]


def test_every_room_has_a_floor_and_nothing_is_loose_in_the_hall() -> None:
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms - DATA == floors().keys()
    assert {path.stem for path in PACKAGE.glob("*.py")} == HALL


def test_rooms_know_only_lower_floors() -> None:
    known = floors()
    up: dict[str, set[str]] = defaultdict(set)
    for module, others in imports().items():
        for other in others:
            one, below = room(module), room(other)
            if one != below and below not in HALL and one not in HALL and known[one] <= known[below]:
                up[module].add(other)
    assert not up


def test_the_hall_knows_no_room_but_the_model_that_transformers_learns() -> None:
    for module, others in imports().items():
        if room(module) in HALL:
            assert {room(other) for other in others} <= {*HALL, "modeling"}, module


def test_nobody_imports_the_front_door() -> None:
    assert not [
        module for module, others in imports().items() for each in others if room(each) == "cli" != room(module)
    ]


def test_no_module_is_its_own_ancestor() -> None:
    assert list(TopologicalSorter(imports()).static_order())


@pytest.mark.parametrize("module", ROOMS)
def test_a_room_loads_only_what_it_may_know(module: str) -> None:
    code = f"import sys, {module}; print(*sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(ROOMS[module]) & set(ended.stdout.split())


@pytest.mark.parametrize("module", ["configuration_upcycled_moe", "modeling_upcycled_moe"])
def test_the_model_may_be_imported_first(module: str) -> None:
    code = f"import upcycle.modeling.{module}, transformers; print(transformers.AutoConfig.for_model)"
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
