"""The scripts beside a recipe, run with stand-ins for Megatron's dataset builder and for SLURM's commands."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
from recipes import checkpoint, request
from transformers import AutoTokenizer

from upcycle.data.corpus import held_out_count
from upcycle.data.sources import Documents
from upcycle.data.tokens import tokenise
from upcycle.megatron.export import export_recipe

if TYPE_CHECKING:
    import torch

pytest_plugins = ("text_model",)
TEXTS = [f"def f{number}(): pass" for number in range(12)]


class Builder:
    """Megatron's `IndexedDatasetBuilder`, but that the .idx file has the documents' tokens as JSON."""

    def __init__(self, path: str, *, dtype: int) -> None:
        assert dtype == 300  # tokens
        self.data, self.documents, self.open = Path(path), [], []

    def add_item(self, tokens: torch.Tensor) -> None:
        self.open += tokens.tolist()

    def end_document(self) -> None:
        self.documents.append(self.open)
        self.open = []

    def finalize(self, index: str) -> None:
        self.data.touch()
        Path(index).write_text(json.dumps(self.documents))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, text_model: Path) -> Path:
    root = tmp_path_factory.mktemp("scripts")
    source = checkpoint("qwen3_moe", root / "moe", tokenizer=text_model)
    return export_recipe(request(root / "recipe", moe=source, nodes=2))


@pytest.fixture
def tokenize(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the script in a directory of its own, where `held_out` documents are held out."""
    module = ModuleType("megatron.core.datasets.indexed_dataset")
    module.IndexedDatasetBuilder = Builder
    module.DType = ModuleType("DType")
    module.DType.optimal_dtype = int
    parts = module.__name__.split(".")
    for end in range(1, len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(".".join(parts[:end])))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.chdir(tmp_path)
    for file in recipe.glob("tokenize*"):
        (tmp_path / file.name).write_text(file.read_text())
    script = tmp_path / "tokenize_data.py"

    def run(*arguments: str, held_out: float = 20) -> None:
        assert script.read_text().count("HELD_OUT = 20  ") == 1
        script.write_text(script.read_text().replace("HELD_OUT = 20  ", f"HELD_OUT = {held_out}  "))
        monkeypatch.setattr(sys, "argv", [script.name, *arguments])
        runpy.run_path(str(script), run_name="__main__")

    return run


def lines(file: Path, texts: list[str]) -> str:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file.name


def read(prefix: Path) -> list[list[int]]:
    assert prefix.with_suffix(".bin").exists()
    documents: list[list[int]] = json.loads(prefix.with_suffix(".idx").read_text())
    return documents


@pytest.mark.parametrize("held_out", [3, 0.25, 0])
def test_the_documents_are_those_of_upcycle_train(tokenize: Any, tmp_path: Path, held_out: float) -> None:
    texts = [*TEXTS, TEXTS[0]]  # a copy stays with the other
    halves = [lines(tmp_path / "a.jsonl", texts[:5]), lines(tmp_path / "b.jsonl", [*texts[5:], ""])]
    tokenize(*halves, "text", held_out=held_out)

    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    expected = tokenise(Documents(lambda: texts), tokenizer, tmp_path / "cache")
    bounds = expected.file.bounds[:, 0]
    documents = [expected.file.tokens[a:b].tolist() for a, b in zip(bounds, bounds[1:], strict=False)]
    split = held_out_count(expected.digests, held_out)
    assert sorted(read(tmp_path / "text")) == sorted(documents[split:])
    assert (tmp_path / "text-held-out.idx").exists() == bool(held_out)
    if held_out:
        assert sorted(read(tmp_path / "text-held-out")) == sorted(documents[:split])


WRONG: dict[str, tuple[tuple[str, ...], str]] = {
    "nothing": ((), "arguments are required: FILE.jsonl, PREFIX"),
    "no prefix": (("a.jsonl",), "arguments are required: PREFIX"),
    "a file as prefix": (("a.jsonl", "b.jsonl"), "PREFIX comes last.*b.jsonl"),
    "no such file": (("c.jsonl", "text"), "there is no file c.jsonl"),
    "no such directory": (("a.jsonl", "away/text"), "a directory that exists.*away/text"),
    "not json": (("broken.jsonl", "text"), "broken.jsonl:2 is not a JSON object"),
    "too few": (("a.jsonl", "text"), "12 different documents are too few: 20"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said(tokenize: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    lines(tmp_path / "a.jsonl", TEXTS)
    lines(tmp_path / "b.jsonl", TEXTS)
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n["text"]\n')
    before = {file.name for file in tmp_path.iterdir()}
    arguments, words = WRONG[case]
    with pytest.raises(SystemExit) as ended:
        tokenize(*arguments)
    said = capsys.readouterr().err if ended.value.code == 2 else str(ended.value.code)
    assert re.search(words, said), said
    assert {file.name for file in tmp_path.iterdir()} == before


def test_a_tokenizer_without_end_of_text(tokenize: Any, tmp_path: Path) -> None:
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(SystemExit, match="no end-of-text token"):
        tokenize(lines(tmp_path / "a.jsonl", TEXTS), "text", held_out=0)


def submit(recipe: Path, tmp_path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the job's script as SLURM would on the first node; `srun` prints its arguments, one a line."""
    commands = tmp_path / "commands"
    commands.mkdir()
    for name, text in {"srun": 'printf "%s\\n" "$@"', "scontrol": 'echo "$*" >&2; printf "n1\\nn2\\n"'}.items():
        (commands / name).write_text(f"#!/bin/sh\n{text}\n")
        (commands / name).chmod(0o755)
    slurm = {"SLURM_SUBMIT_DIR": str(recipe), "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_ID": "7"}
    environment = {"PATH": f"{commands}:{os.environ['PATH']}", **slurm, **variables}
    script = ["bash", str(recipe / "train.sbatch")]
    return subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)


def test_the_job_starts_a_process_for_every_gpu(recipe: Path, tmp_path: Path) -> None:
    (recipe / "here.idx").touch()
    ended = submit(recipe, tmp_path, DATA="here", VENV="/venv")
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == "show hostnames n[1-2]\n"
    launcher = ["--kill-on-bad-exit=1", "/venv/bin/python", "-m", "torch.distributed.run"]
    ranks = ["--nnodes=2", "--nproc-per-node=8", "--rdzv-id=7", "--rdzv-backend=c10d", "--rdzv-endpoint=n1:29500"]
    assert ended.stdout.splitlines() == [*launcher, *ranks, "recipe.py"]
    text = (recipe / "train.sbatch").read_text()
    for option in ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=8", "--requeue"):
        assert f"#SBATCH {option}\n" in text


def test_a_container_sees_the_directory_of_every_prefix(recipe: Path, tmp_path: Path) -> None:
    (recipe / "data").mkdir()
    (tmp_path / "b").mkdir()
    for prefix in (recipe / "data" / "a", tmp_path / "b" / "c"):
        prefix.with_suffix(".idx").touch()
    ended = submit(recipe, tmp_path, DATA=f"data/a {tmp_path}/b/c", CONTAINER="image.sqsh")
    assert ended.returncode == 0, ended.stderr
    arguments = ended.stdout.splitlines()
    assert f"--container-mounts={recipe},{recipe}/data,{tmp_path}/b" in arguments
    assert "--container-image=image.sqsh" in arguments
    assert f"--container-workdir={recipe}" in arguments
    assert "python" in arguments


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"VENV": "/venv"}, "set DATA"),
        ({"VENV": "/venv", "DATA": "away"}, "DATA names away, but there is no away.idx"),
        ({"DATA": "there"}, "set VENV or CONTAINER"),
    ],
)
def test_a_job_that_cannot_start_says_why(recipe: Path, tmp_path: Path, variables: dict[str, str], words: str) -> None:
    (recipe / "there.idx").touch()
    ended = submit(recipe, tmp_path, **variables)
    assert ended.returncode
    assert words in ended.stderr
    assert not ended.stdout
