"""docs/reward.md: every command runs, on fewer steps, with a stand-in for the lexicon where there is none."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import rewards
from documents import commands

from upcycle.arch.head import NEMO_ATTRIBUTES, OFFSETS
from upcycle.arch.targets import TARGETS
from upcycle.cli import main
from upcycle.options.extras import has
from upcycle.tracking.schema import metric

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs/reward.md").read_text()
FEWER = {"budget.steps": "4", "validation.every": "2", "progress": "false"}


@pytest.fixture
def lexicon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if not has("textblob"):
        monkeypatch.syspath_prepend(rewards.lexicons(tmp_path / "packages"))
    return


@pytest.mark.usefixtures("lexicon")
def test_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "models").symlink_to(ROOT / "models")
    monkeypatch.chdir(tmp_path)
    for line in commands(TEXT):
        program, *words = shlex.split(line)
        assert program == "upcycle"
        kept = [word for word in words if word.partition("=")[0] not in FEWER]
        fewer = [f"{name}={value}" for name, value in FEWER.items()] if words[0] == "train" else []
        monkeypatch.setattr(sys, "argv", ["upcycle", *kept, *fewer])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code, capsys.readouterr().err
    shown = capsys.readouterr().out
    assert "polarity" in shown
    assert "of the scores' mean square" in shown
    named = json.loads((tmp_path / "reward/config.json").read_text())
    assert (named["architectures"], named["problem_type"]) == (["LlamaForSequenceClassification"], "regression")


def test_what_it_names_is_so() -> None:
    for target in TARGETS.values():
        assert (f"`{target.model_type}`" in TEXT) is target.reward
    assert ", ".join(NEMO_ATTRIBUTES[4:]) in TEXT
    assert f"`{OFFSETS}`" in TEXT
    for name in ("train/mse", "val/mse", "val/{attribute}/pearson", "val/{attribute}/spearman"):
        assert metric(name)
