"""What `upcycle inspect` says of a checkpoint."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import conversions
import pytest
from rich.console import Console

from upcycle.errors import SourceError
from upcycle.models.manifest import MANIFEST
from upcycle.options.config import InspectConfig
from upcycle.verify.inspection import inspect, inspection_table

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def look(directory: Path) -> dict[str, object]:
    return inspect(InspectConfig(path=str(directory), format="json"))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {}),
        ("llama", {"router_order": "topk_softmax"}),
        ("llama", {"target": "granitemoeshared", "router_order": "topk_softmax", "shared_experts": 2}),
        ("olmo2", {}),
        ("gpt2", {"shared_experts": 2}),
        ("gemma2", {"layers": [1]}),
        ("nemotron_h", {"router_order": "auto"}),
        ("nemotron_h_runs", {"router_order": "auto", "shared_neurons": 4}),
        ("nemotron_h_biases", {"router_order": "auto"}),
        ("llama", {"latent": 16}),
    ],
)
def test_shape_provenance_and_similarity(
    dense: Callable[[str], Path], tmp_path: Path, name: str, changes: dict[str, object]
) -> None:
    converted = conversions.run(conversions.options(dense(name), tmp_path / "moe", **changes))
    found = look(converted.directory)
    moe = converted.plan.moe
    assert found["model_type"] == converted.plan.target
    shape = found["moe"]
    assert isinstance(shape, dict)
    assert shape["name"] == moe.name
    assert shape["router_order"] == moe.router_order
    assert shape["layers"] == list(moe.layers)
    assert shape["latent"] == moe.latent
    assert found["provenance"]["source"]["given"] == str(dense(name))
    for layer in found["similarity"]:
        assert layer["across_groups"] == pytest.approx(1.0, abs=1e-6)
        assert abs(layer["within_group"]) < 0.2


def test_experts_that_differ_are_less_similar(dense: Callable[[str], Path], tmp_path: Path) -> None:
    request = conversions.options(dense("llama"), tmp_path / "moe", init="noise", std=1.0)
    for layer in look(conversions.run(request).directory)["similarity"]:
        assert 0.3 < layer["across_groups"] < 0.7  # unit noise on unit weights: 1 / (1 + 1)


def test_without_granularity_there_is_no_group(dense: Callable[[str], Path], tmp_path: Path) -> None:
    directory = conversions.run(conversions.options(dense("llama"), tmp_path / "moe", granularity=1)).directory
    assert all(layer["within_group"] is None for layer in look(directory)["similarity"])


def test_a_moe_without_manifest(dense: Callable[[str], Path], tmp_path: Path) -> None:
    directory = conversions.run(conversions.options(dense("llama"), tmp_path / "moe")).directory
    (directory / MANIFEST).unlink()
    found = look(directory)
    assert "provenance" not in found
    assert "no upcycle_manifest.json" in shown(found)


def test_a_dense_checkpoint(dense: Callable[[str], Path]) -> None:
    found = look(dense("phi3"))
    assert found["model_type"] == "phi3"
    assert "moe" not in found
    assert "phi3" in shown(found)


def shown(found: dict[str, object]) -> str:
    console = Console(record=True, width=120)
    console.print(inspection_table(found))
    return console.export_text()


def test_the_table_shows_what_was_found(dense: Callable[[str], Path], tmp_path: Path) -> None:
    directory = conversions.run(conversions.options(dense("llama"), tmp_path / "moe")).directory
    text = shown(look(directory))
    for expected in ("qwen2_moe", "E4G2T2", "softmax_topk", "lossless", "1.000000"):
        assert expected in text


@pytest.mark.parametrize(("content", "message"), [("{", "not JSON"), ("{}", "damaged"), ('{"format": 99}', "format")])
def test_a_manifest_that_cannot_be_read(
    dense: Callable[[str], Path], tmp_path: Path, content: str, message: str
) -> None:
    directory = conversions.run(conversions.options(dense("llama"), tmp_path / "moe")).directory
    (directory / MANIFEST).write_text(content)
    with pytest.raises(SourceError, match=message):
        look(directory)


def test_no_checkpoint_there(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no config.json there"):
        look(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not JSON"), ("[]", "not a JSON object"), ('{"model_type": "mixtral", "hidden_size": "wide"}', "not valid")],
)
def test_a_config_that_cannot_be_read(dense: Callable[[str], Path], tmp_path: Path, content: str, message: str) -> None:
    directory = shutil.copytree(dense("llama_tied"), tmp_path / "damaged")
    (directory / "config.json").write_text(content)
    with pytest.raises(SourceError, match=message):
        look(directory)


def test_a_truncated_checkpoint(dense: Callable[[str], Path], tmp_path: Path) -> None:
    damaged = shutil.copytree(dense("llama_tied"), tmp_path / "damaged")
    file = next(damaged.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(SourceError):
        look(damaged)
