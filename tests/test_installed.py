"""The package as a wheel brings it: everything that commands read beside the code is in it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import upcycle as package
from upcycle.options.arguments import CONF

if TYPE_CHECKING:
    from collections.abc import Callable

    from cli import Outcome

pytest_plugins = ("text_model", "tiny")
TREE = Path(__file__).parent.parent
INSTALLED = Path(package.__file__).parent
GENERATED = ("__pycache__", ".mypy_cache")


def files(directory: Path) -> set[str]:
    """Every file below a directory, links followed, by its path in it."""
    found = set()
    for each in directory.iterdir():
        if each.name in GENERATED:
            continue
        found |= {f"{each.name}/{name}" for name in files(each)} if each.is_dir() else {each.name}
    return found


@pytest.mark.skipif(INSTALLED.parent == TREE, reason="runs the tree's own files; `make test-lowest` installs a wheel")
def test_the_wheel_has_every_file_of_the_package() -> None:
    expected = files(TREE / "upcycle")
    assert {"conf/train.yaml", "conf/sweeps/layers.yaml", "dashboard/report.html.jinja"} <= expected
    assert files(INSTALLED) == expected


def test_plans_and_sweeps_need_no_repository(
    upcycle: Callable[..., Outcome], tiny_llama: Path, text: Path, tmp_path: Path
) -> None:
    """In an empty directory."""
    assert (CONF / "sweeps").is_dir()
    planned = upcycle("plan", f"source={tiny_llama}", "moe.granularity=3", "moe.top_k=3", "gpu=h100")
    assert planned.status == 0, planned.err
    data = ["data=text", f"data.files='{text}/*.txt'", "data.held_out=2", f"data.cache_dir='{text.parent}/cache'"]
    given = [f"source={TREE / 'models/stdlib-250k'}", f"output={tmp_path / 'runs'}", "scale=smoke", *data]
    given.append("sweep.seeds=[0]")
    listed = upcycle("plan-sweep", "sweeps/layers", *given)
    assert listed.status == 0, listed.err
    trained = upcycle("train", "+sweeps=layers", "+arm=baseline", *given)
    assert trained.status == 0, trained.err
