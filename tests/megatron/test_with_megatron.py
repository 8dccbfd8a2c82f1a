"""Recipes against the real packages, which have an environment of their own: `make test-megatron`.

Types are checked wherever megatron-bridge is installed, without running it and without what it needs. The configuration
is built where it can be imported, which takes Transformer Engine and so a GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from recipes import TYPES, checkpoint, request

from upcycle.megatron.export import export_recipe

if TYPE_CHECKING:
    from pathlib import Path

pytest_plugins = ("text_model",)
PYTHON = os.environ.get("MEGATRON_PYTHON", "")
BUILD = "import recipe; c = recipe.config(); print(c.model.num_moe_experts, c.train.train_iters)"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="MEGATRON_PYTHON does not name a Python with megatron-bridge"),
]


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory, text_model: Path) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("recipes")
    sources = {name: checkpoint(name, root / f"{name}-source", tokenizer=text_model) for name in TYPES}
    return {name: export_recipe(request(root / name, moe=source)) for name, source in sources.items()}


def objections(directory: Path) -> list[str]:
    """What mypy says of a recipe's files, with the packages' own signatures."""
    settings = directory.parent / "mypy.ini"
    cache = f"cache_dir = {directory.parent}/cache\n"
    settings.write_text("[mypy]\nfollow_untyped_imports = true\nignore_missing_imports = true\n" + cache)
    python = ["--python-executable", PYTHON, "--python-version", "3.12"]
    files = sorted(file.name for file in directory.glob("*.py"))
    ended = subprocess.run(
        [sys.executable, "-m", "mypy", f"--config-file={settings}", *python, *files],
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode in (0, 1), ended.stderr
    return [line for line in ended.stdout.splitlines() if line.startswith(tuple(f"{file}:" for file in files))]


@pytest.mark.parametrize("model_type", TYPES)
def test_the_types_are_the_packages(recipes: dict[str, Path], model_type: str) -> None:
    assert objections(recipes[model_type]) == []


@pytest.mark.parametrize(
    ("before", "after"),
    [("global_batch_size=", "batch_size_global="), ("moe_aux_loss_coeff = ", 'moe_aux_loss_coeff = "much" or ')],
)
def test_a_wrong_name_or_type_is_noticed(recipes: dict[str, Path], before: str, after: str) -> None:
    """The mutants of the test above."""
    file = recipes["mixtral"] / "recipe.py"
    text = file.read_text()
    assert text.count(before) == 1
    try:
        file.write_text(text.replace(before, after))
        assert objections(recipes["mixtral"])
    finally:
        file.write_text(text)


@pytest.mark.parametrize("model_type", TYPES)
def test_the_configuration_is_built(recipes: dict[str, Path], model_type: str) -> None:
    code = "import megatron.bridge"
    found = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, check=False)
    if found.returncode:
        pytest.skip(f"megatron.bridge cannot be imported: {found.stderr.strip().splitlines()[-1]}")
    ended = subprocess.run([PYTHON, "-c", BUILD], cwd=recipes[model_type], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split()[-2:] == ["8", "10"]
