"""Packages that one command needs alone: the core does without, and what needs one gives the line that installs it."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

import conversions
import pytest
import training

from upcycle.errors import MissingPackageError, UpcycleError
from upcycle.models.load import load_tokenizer_from
from upcycle.options.config import VerifyConfig
from upcycle.options.extras import EXTRAS, has, need
from upcycle.verify.report import FIGURE, REPORT, write_report
from upcycle.verify.run import verify

if TYPE_CHECKING:
    from collections.abc import Callable

    from cli import Outcome

pytest_plugins = ("text_model", "tiny")
PROJECT = tomllib.loads((Path(__file__).parent.parent.parent / "pyproject.toml").read_text())["project"]
DISTRIBUTIONS = {"google.protobuf": "protobuf", "wandb_workspaces": "wandb-workspaces"}


@pytest.fixture
def core_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No package of an extra can be imported, but pandas where it is there: pyarrow, once it has it, would stumble."""
    for module in EXTRAS.keys() - {"pandas"}:
        monkeypatch.setitem(sys.modules, module, None)


@pytest.mark.parametrize("module", EXTRAS)
def test_the_extra_that_is_named_brings_the_package(module: str) -> None:
    names = [re.match(r"[\w-]+", line)[0] for line in PROJECT["optional-dependencies"][EXTRAS[module]]]  # type: ignore[index]
    assert DISTRIBUTIONS.get(module, module) in names


def test_nothing_is_pinned() -> None:
    lines = [*PROJECT["dependencies"], *(line for each in PROJECT["optional-dependencies"].values() for line in each)]
    assert not [line for line in lines if "==" in line]


def test_several_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    assert (has("pandas"), has("no_such_package.inside"), has("json")) == (False, False, True)
    need("reading", "json")
    with pytest.raises(
        MissingPackageError, match=r"reading needs[\s\S]*no pandas[\s\S]*pip install 'upcycle\[analysis\]'"
    ):
        need("reading", "json", "pandas")
    assert issubclass(MissingPackageError, UpcycleError)
    assert issubclass(MissingPackageError, ImportError)


@pytest.mark.usefixtures("core_alone")
def test_convert_verify_train_without_them(
    upcycle: Callable[..., Outcome], text_model: Path, text: Path, tmp_path: Path
) -> None:
    moe = tmp_path / "moe"
    converted = upcycle("convert", f"source={text_model}", f"output={moe}", *training.SMALL_MOE)
    assert converted.status == 0, converted.err
    verified = upcycle("verify", f"source={text_model}", f"moe={moe}", "tokens=96")
    assert verified.status == 0, verified.err
    assert f"no {FIGURE} without matplotlib: pip install 'upcycle[plots]'" in verified.err
    trained = upcycle(
        "train", "model=checkpoint", f"source={moe}", f"output={tmp_path / 'run'}", *training.overrides(text)
    )
    assert trained.status == 0, trained.err
    exported = upcycle("export", f"run={tmp_path / 'run'}", f"output={tmp_path / 'out'}")
    assert exported.status == 0, exported.err


@pytest.mark.usefixtures("core_alone")
def test_no_figure_of_an_older_report_stays(text_model: Path, tmp_path: Path) -> None:
    moe = conversions.run(conversions.options(text_model, tmp_path / "moe")).directory
    (moe / FIGURE).write_bytes(b"of another report")
    options = VerifyConfig(
        source=str(text_model), moe=str(moe), text=None, tokens=96, sequence_length=48, tolerance=1e-3, format="table"
    )
    write_report(verify(options), str(moe))
    assert (moe / REPORT).exists()
    assert not (moe / FIGURE).exists()


@pytest.mark.usefixtures("core_alone")
def test_what_needs_one_is_refused_before_anything_is_written(
    upcycle: Callable[..., Outcome], text_model: Path, text: Path, tmp_path: Path
) -> None:
    run = ("train", "model=dense", f"source={text_model}", f"output={tmp_path / 'run'}", *training.overrides(text))
    for mode in ("offline", "online"):
        refused = upcycle(*run, f"wandb.mode={mode}")
        refused.refused(f"wandb.mode={mode} needs a package", found="no wandb", remedy="pip install 'upcycle[wandb]'")
    others = [each for each in run if not each.startswith("data")]
    upcycle(*others, "data=hf", "data.path=name").refused("data=hf needs", remedy="pip install 'upcycle[datasets]'")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    convert = upcycle("convert", f"source={tmp_path / 'model.gguf'}", f"output={tmp_path / 'moe'}")
    convert.refused("a GGUF file needs", remedy="pip install 'upcycle[gguf]'")
    upcycle("sync", tmp_path).refused("upcycle sync needs", remedy="pip install 'upcycle[wandb]'")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["model.gguf", "work"]


def test_analysis_is_refused_when_it_is_imported(tmp_path: Path) -> None:
    code = "import sys; sys.modules['pandas'] = None; from upcycle.cli import main; main()"
    ended = subprocess.run(
        [sys.executable, "-c", code, "report", tmp_path], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 1
    assert "remedy:   pip install 'upcycle[analysis]'" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_sentencepiece_model_that_nothing_can_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0c\n\x05<unk>")
    with pytest.raises(MissingPackageError, match=r"pip install 'upcycle\[sentencepiece\]'"):
        load_tokenizer_from(tmp_path)
