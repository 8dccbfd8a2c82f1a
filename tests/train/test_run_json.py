"""run.json of a real run: what it says of options, machine, code, source and data is so."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import training

from upcycle.analysis import compare, load_runs
from upcycle.data.corpus import build_corpus
from upcycle.errors import RecordError
from upcycle.models.load import load_tokenizer_from
from upcycle.tracking.record import read_run
from upcycle.train.config import ExportConfig, TrainConfig
from upcycle.train.export import export
from upcycle.train.surroundings import surroundings

pytest_plugins = ("text_model",)

KEYS = {
    *("schema", "status", "config", "started", "versions", "hardware", "git_commit", "git_dirty", "steps"),
    *("flops_per_step", "kernel", "layout", "ranks", "data_hash", "order_hash", "source_sha256", "manifest", "summary"),
}
CODE = "train.py"


def git(place: Path, *arguments: str) -> str:
    who = ["-c", "user.name=Ada", "-c", "user.email=ada@example.com"]
    return subprocess.check_output(["git", "-C", str(place), *who, *arguments], text=True).strip()


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's own, with one commit."""
    place = tmp_path_factory.mktemp("repository")
    git(place, "init", "--quiet")
    (place / CODE).write_text("lr = 1\n")
    git(place, "add", CODE)
    git(place, "commit", "--quiet", "--message", "first")
    return place


@pytest.fixture(scope="module")
def config(text: Path, text_model: Path, repository: Path) -> TrainConfig:
    made = ("model=upcycle", f"source='{text_model}'", *training.SMALL_MOE, "budget.steps=2", "seed=3")
    return training.options(text, repository / "run", *made)


@pytest.fixture(scope="module")
def recorded(config: TrainConfig, repository: Path) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(repository)
        training.run(config)
    return read_run(repository / "run")


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_it_has_its_entries(recorded: dict[str, Any], config: TrainConfig) -> None:
    assert recorded.keys() == KEYS
    assert (recorded["schema"], recorded["status"], recorded["steps"]) == (1, "finished", 2)
    assert recorded["config"] == json.loads(json.dumps(asdict(config)))


def test_versions_and_hardware(recorded: dict[str, Any]) -> None:
    packages = ("upcycle", "torch", "lightning", "transformers")
    assert recorded["versions"] == {"python": platform.python_version()} | {name: version(name) for name in packages}
    hardware = dict(recorded["hardware"])
    known = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), flags=re.MULTILINE)
    assert hardware.pop("cpu") in (known or [platform.processor(), platform.machine()])
    assert hardware == {
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory": psutil.virtual_memory().total,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def test_the_commit_is_the_working_directorys(recorded: dict[str, Any], repository: Path) -> None:
    """The run itself lies there too, which is no change of the code."""
    assert (recorded["git_commit"], recorded["git_dirty"]) == (git(repository, "rev-parse", "HEAD"), False)


def test_changes_since_the_commit(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)
    (repository / CODE).write_text("lr = 2\n")
    found = surroundings()
    (repository / CODE).write_text("lr = 1\n")
    assert (found["git_commit"], found["git_dirty"]) == (git(repository, "rev-parse", "HEAD"), True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    found = surroundings()
    assert (found["git_commit"], found["git_dirty"]) == (None, None)


def test_the_source(recorded: dict[str, Any], text_model: Path) -> None:
    hashes = {name: sha256(text_model / name) for name in ("config.json", "model.safetensors")}
    assert recorded["source_sha256"] == recorded["manifest"]["source"]["sha256"] == hashes
    assert recorded["manifest"]["seed"] == 3


def test_data_and_order(recorded: dict[str, Any], config: TrainConfig, text_model: Path, tmp_path: Path) -> None:
    """Recomputed without the cache; the hash of the data moves with a letter of it."""
    tokenizer = load_tokenizer_from(text_model)
    fresh = asdict(config.data) | {"cache_dir": str(tmp_path / "cache")}
    corpus = build_corpus(type(config.data)(**fresh), tokenizer, sequence_length=config.sequence_length)
    assert recorded["data_hash"] == corpus.hash
    order = corpus.order(config.seed)
    indices = np.array([order[position] for position in range(10_000)], dtype="<i8")
    assert recorded["order_hash"] == hashlib.sha256(indices.tobytes()).hexdigest()

    place = tmp_path / "text"
    place.mkdir()
    for file in Path(str(config.data.files)).parent.iterdir():
        (place / file.name).write_text(file.read_text())
    (place / "abc.txt").write_text((place / "abc.txt").read_text().replace("a", "b", 1))
    changed = type(config.data)(**fresh | {"files": f"{place}/*.txt"})
    assert build_corpus(changed, tokenizer, sequence_length=config.sequence_length).hash != corpus.hash


@pytest.fixture(scope="module")
def trained(text: Path, text_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two exports of one upcycled model that was trained at different learning rates."""
    root, exported = tmp_path_factory.mktemp("trained"), {}
    for peak in ("1e-3", "1e-2"):
        made = ("model=upcycle", f"source='{text_model}'", *training.SMALL_MOE, "budget.steps=2")
        training.run(training.options(text, root / f"run-{peak}", *made, f"schedule.peak={peak}"))
        asked = ExportConfig(
            run=str(root / f"run-{peak}"), output=str(root / peak), checkpoint="last", dtype="float32", overwrite=False
        )
        exported[peak] = export(asked)
    return exported


def go_on(text: Path, source: Path, output: Path) -> dict[str, Any]:
    training.run(training.options(text, output, "model=checkpoint", f"source='{source}'", "budget.steps=1"))
    return read_run(output)


def test_trained_mixtures_are_sources_of_their_own(text: Path, trained: dict[str, Path], tmp_path: Path) -> None:
    for peak, source in trained.items():
        record = go_on(text, source, tmp_path / peak)
        assert record["source_sha256"] == {name: sha256(source / name) for name in ("config.json", "model.safetensors")}
    with pytest.raises(RecordError, match="their source differ"):
        compare(load_runs(tmp_path), arms="source", baseline=str(trained["1e-3"]))


def test_a_converted_model_is_the_dense_one(
    recorded: dict[str, Any], text: Path, text_moe: Path, tmp_path: Path
) -> None:
    assert go_on(text, text_moe, tmp_path / "run")["source_sha256"] == recorded["source_sha256"]


def test_a_mixture_without_a_manifest_is_its_own_source(text: Path, text_moe: Path, tmp_path: Path) -> None:
    moe = tmp_path / "moe"
    moe.mkdir()
    for file in text_moe.iterdir():
        if file.is_file() and file.name != "upcycle_manifest.json":
            (moe / file.name).write_bytes(file.read_bytes())
    weights = [file.name for file in moe.glob("*.safetensors")]
    record = go_on(text, moe, tmp_path / "run")
    assert record["source_sha256"] == {name: sha256(moe / name) for name in ("config.json", *weights)}
