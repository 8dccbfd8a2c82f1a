"""`upcycle evaluate` as its user meets it: dense and MoE models, tables and JSON, and what it refuses."""

from __future__ import annotations

import json
import math
import shutil
import sys
from typing import TYPE_CHECKING, Any

import conversions
import models
import pytest
from lm_eval.tasks import TaskManager
from safetensors.torch import load_file, save_file

from upcycle.data.bytes_tokenizer import byte_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from cli import Outcome

    Evaluate = Callable[..., Outcome]

pytest_plugins = ("tiny",)
VOCABULARY, POSITIONS = 257, 64
TASK = "python_stdlib_facts"
TOLERANCE = 1e-4  # nats per token; 1.3e-5 measured, a spoilt expert gives 1.5e-3


@pytest.fixture(scope="module")
def dense_bytes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama that reads bytes."""
    directory = tmp_path_factory.mktemp("evaluate") / "dense"
    models.save(models.build("llama", vocab_size=VOCABULARY), directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def moe_bytes(dense_bytes: Path) -> Path:
    """Its conversion to E4G2T2."""
    return conversions.run(conversions.options(dense_bytes, dense_bytes.with_name("moe"))).directory


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    """Options for twenty texts, of which four are held out."""
    (tmp_path / "texts").mkdir()
    for number in range(20):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"text {number} é\n" * 20)
    return ["data=text", f"data.files={tmp_path}/texts/*.txt", "data.held_out=4", f"data.cache_dir={tmp_path}/cache"]


def measured(outcome: Outcome) -> dict[str, Any]:
    assert outcome.status == 0, outcome
    found: dict[str, Any] = json.loads(outcome.out)
    return found


def test_dense_and_moe_have_the_same_losses(
    upcycle: Evaluate, dense_bytes: Path, moe_bytes: Path, data: list[str]
) -> None:
    """The conversion is lossless but for the router's spread; a spoilt expert is seen."""
    losses = []
    for model, kind in ((dense_bytes, "llama"), (moe_bytes, "qwen2_moe")):
        found = measured(upcycle("evaluate", f"model={model}", *data, "format=json"))
        assert (found["model_type"], found["sequence_length"], found["tasks"]) == (kind, POSITIONS, [])
        losses.append(found["domains"]["text"]["loss"])
    assert abs(losses[0] - losses[1]) <= TOLERANCE
    spoilt = shutil.copytree(moe_bytes, moe_bytes.with_name("spoilt"))
    conversions.edit(spoilt, lambda tensors: [t.mul_(-2) for name, t in tensors.items() if "experts.0.down" in name])
    loss = measured(upcycle("evaluate", f"model={spoilt}", *data, "format=json"))["domains"]["text"]["loss"]
    assert abs(losses[0] - loss) > 10 * TOLERANCE


def test_the_units(upcycle: Evaluate, dense_bytes: Path, data: list[str]) -> None:
    found = measured(upcycle("evaluate", f"model={dense_bytes}", *data, "sequence_length=16", "format=json"))
    row = found["domains"]["text"]
    assert math.isclose(row["perplexity"], math.exp(row["loss"]))
    # A document has 20 lines "text N é" of 10 or 11 bytes, and one end of text.
    assert 221 / 220 <= row["nats_per_byte"] / row["loss"] <= 201 / 200
    assert row["tokens"] % 16 == 0
    assert row["tokens"] > 16
    fewer = measured(
        upcycle("evaluate", f"model={dense_bytes}", *data, "sequence_length=16", "tokens=40", "format=json")
    )
    assert fewer["domains"]["text"]["tokens"] == 32


def test_a_mixture_by_domain(upcycle: Evaluate, dense_bytes: Path, data: list[str], tmp_path: Path) -> None:
    some, others = (f"{{name: text, files: '{tmp_path}/texts/{names}.txt', weight: 1}}" for names in ("?", "??"))
    outcome = upcycle(
        "evaluate",
        f"model={dense_bytes}",
        "data=mixture",
        f"data.domains={{a: {some}, b: {others}}}",
        "data.held_out=2",
        data[3],
        "tokens=64",
    )
    assert outcome.status == 0, outcome
    for text in ("a", "b", "nats per token", "perplexity", "nats per byte"):
        assert text in outcome.out


def test_the_result_is_written(upcycle: Evaluate, dense_bytes: Path, data: list[str], tmp_path: Path) -> None:
    file = tmp_path / "new" / "evaluation.json"
    printed = upcycle("evaluate", f"model={dense_bytes}", *data, f"output={file}", "format=json").out
    assert json.loads(file.read_text()) == json.loads(printed)
    assert [each.name for each in file.parent.iterdir()] == [file.name]
    (tmp_path / "file").write_text("")
    upcycle("evaluate", f"model={dense_bytes}", *data, f"output={tmp_path}/file/x.json").refused("cannot write")


def test_a_task(upcycle: Evaluate, moe_bytes: Path, data: list[str]) -> None:
    found = measured(upcycle("evaluate", f"model={moe_bytes}", *data, f"tasks=[{TASK}]", "format=json"))
    rows = {row["metric"]: row for row in found["tasks"]}
    assert set(rows) == {"acc", "acc_norm"}
    assert all(row["task"] == TASK and 0 <= row["value"] <= 1 and row["stderr"] > 0 for row in rows.values())
    assert math.isclose(rows["acc"]["value"] * 40, round(rows["acc"]["value"] * 40))
    table = upcycle("evaluate", f"model={moe_bytes}", *data, f"tasks=[{TASK}]").out
    assert TASK in table
    assert "acc_norm" in table


def test_a_task_of_nobody(
    upcycle: Evaluate, dense_bytes: Path, data: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without the 14,000 tasks of the harness, which take 12 seconds to list.
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda include_path, **_: manager(include_path, False))
    outcome = upcycle("evaluate", f"model={dense_bytes}", *data, "tasks=[python_stdlib_fact]")
    outcome.refused("unknown task", found="python_stdlib_fact", remedy=TASK)


def manager(include_path: str, include_defaults: bool) -> TaskManager:
    return TaskManager(include_path=include_path, include_defaults=include_defaults)


def test_without_the_harness(
    upcycle: Evaluate, dense_bytes: Path, data: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    outcome = upcycle("evaluate", f"model={dense_bytes}", *data, f"tasks=[{TASK}]")
    outcome.refused("tasks=… needs a package", found="no lm_eval", remedy="pip install 'upcycle[eval]'")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("sequence_length=65", "sequence_length is out of range"),
        ("sequence_length=0", "sequence_length is out of range"),
        ("tokens=63", "tokens do not fill one window"),
        ("data.held_out=0", "nothing is held out"),
        ("format=xml", "unknown format"),
        ("data.held_out=20", "leaves no document"),
        ("data.path=x", "data.path does not apply here"),
    ],
)
def test_bad_options(upcycle: Evaluate, dense_bytes: Path, data: list[str], option: str, message: str) -> None:
    upcycle("evaluate", f"model={dense_bytes}", *data, option).refused(message)


@pytest.fixture
def copied(dense_bytes: Path, tmp_path: Path) -> Path:
    return shutil.copytree(dense_bytes, tmp_path / "copied")


def test_a_tensor_is_missing(upcycle: Evaluate, copied: Path, data: list[str]) -> None:
    file = copied / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    upcycle("evaluate", f"model={copied}", *data).refused("lacks tensors", found="model.layers.1.mlp.up_proj.weight")


def test_damaged_weights(upcycle: Evaluate, copied: Path, data: list[str]) -> None:
    (copied / "model.safetensors").write_bytes(b"\x00" * 100)
    upcycle("evaluate", f"model={copied}", *data).refused("the model cannot be loaded")


def test_no_tokenizer(upcycle: Evaluate, copied: Path, data: list[str]) -> None:
    for file in copied.glob("tokenizer*"):
        file.unlink()
    upcycle("evaluate", f"model={copied}", *data).refused("no tokenizer")


def test_the_tokenizer_of_another_model(upcycle: Evaluate, tmp_path: Path, data: list[str]) -> None:
    models.save(models.build("llama"), tmp_path / "small")
    byte_tokenizer().save_pretrained(tmp_path / "small")
    upcycle("evaluate", f"model={tmp_path}/small", *data).refused(
        "the tokenizer has more tokens than the model", found="tokenizer 257, model 64"
    )


def test_no_model(upcycle: Evaluate, data: list[str], tmp_path: Path) -> None:
    upcycle("evaluate", f"model={tmp_path}/nothing", *data).refused("source does not exist")
    upcycle("evaluate", f"model={tmp_path}", *data).refused("no config.json there")
    upcycle("evaluate", *data).refused("a required option is missing")
