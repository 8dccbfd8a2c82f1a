"""An adapter in a model's directory is a question, whichever command opens it."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import conversions
import models
import pytest
import torch
import training
from cli import SMALL, contents
from safetensors.torch import save_file

from upcycle.data.bytes_tokenizer import byte_tokenizer
from upcycle.errors import SourceError
from upcycle.models.source import open_source
from upcycle.sweep.check import estimate

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from cli import Outcome

pytest_plugins = ("tiny", "text_model")


def add_adapter(directory: Path, content: str = '{"base_model_name_or_path": "meta/base"}') -> Path:
    (directory / "adapter_config.json").write_text(content)
    save_file({"base_model.model.q_proj.lora_A.weight": torch.ones(2)}, directory / "adapter_model.safetensors")
    return directory


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A dense model and its conversion, without and with an adapter beside them."""
    root = tmp_path_factory.mktemp("adapter")
    models.save(models.build("llama", vocab_size=257), root / "dense")
    byte_tokenizer().save_pretrained(root / "dense")
    conversions.run(conversions.options(root / "dense", root / "moe"))
    for name in ("dense", "moe"):
        add_adapter(shutil.copytree(root / name, root / f"{name}_with"))
    return {path.name: path for path in root.iterdir()}


COMMANDS = {
    "convert": ["convert", "source={dense_with}", "output={out}", *SMALL],
    "plan": ["plan", "source={dense_with}", *SMALL],
    "verify of a dense model": ["verify", "source={dense_with}", "moe={moe}"],
    "verify of a MoE": ["verify", "source={dense}", "moe={moe_with}"],
    "evaluate": ["evaluate", "model={moe_with}"],
    "evaluate of a dense model": ["evaluate", "model={dense_with}"],
    "inspect": ["inspect", "path={moe_with}"],
    "export": ["export", "format=megatron-bridge", "moe={moe_with}", "output={out}", "steps=10"],
    **{
        f"train {model}": ["train", f"model={model}", "source={dense_with}", "output={out}", *SMALL]
        for model in ("dense", "upcycle", "scratch", "checkpoint")
    },
    "train a MoE": ["train", "model=checkpoint", "source={moe_with}", "output={out}"],
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS.keys())
def test_every_command_asks(
    upcycle: Callable[..., Outcome], directories: dict[str, Path], tmp_path: Path, command: list[str]
) -> None:
    before = contents(tmp_path)
    places = {**directories, "out": tmp_path / "out"}
    outcome = upcycle(*(each.format(**places) for each in command))
    found = "adapter_config.json, for base model meta/base"
    outcome.refused("an adapter lies beside the model", found=found, remedy="merge_and_unload")
    assert contents(tmp_path) == before


def test_a_sweep_asks(text: Path, directories: dict[str, Path], tmp_path: Path) -> None:
    arm = training.options(text, tmp_path / "run", "model=dense", f"source='{directories['dense_with']}'")
    with pytest.raises(SourceError, match="an adapter lies beside the model"):
        estimate(arm, ranks=None, execute=False)


def test_the_second_way_out_works(directories: dict[str, Path], tmp_path: Path) -> None:
    """The adapter's files moved away, the conversion is that of the model alone."""
    source = shutil.copytree(directories["dense_with"], tmp_path / "source")
    (tmp_path / "adapter").mkdir()
    for file in source.glob("adapter_*"):
        file.rename(tmp_path / "adapter" / file.name)
    output = conversions.run(conversions.options(source, tmp_path / "moe")).directory
    file = "model.safetensors"
    assert (output / file).read_bytes() == (directories["moe"] / file).read_bytes()


@pytest.mark.parametrize("with_config", [False, True])
@pytest.mark.parametrize(
    ("content", "named"),
    [
        ('{"base_model_name_or_path": "meta/base"}', "for base model meta/base"),
        ("{", "for a base model that it does not name"),
        ("[]", "for a base model that it does not name"),
        ('{"base_model_name_or_path": null}', "for a base model that it does not name"),
    ],
)
def test_a_directory_with_nothing_but_an_adapter(
    directories: dict[str, Path], tmp_path: Path, content: str, named: str, with_config: bool
) -> None:
    source = tmp_path / "adapter"
    source.mkdir()
    (source / "training_args.bin").write_bytes(b"")
    if with_config:
        shutil.copy(directories["dense"] / "config.json", source)
    add_adapter(source, content)
    with pytest.raises(SourceError, match=f"holds an adapter, not a model\n.*adapter_config.json, {named}") as refused:
        open_source(str(source))
    assert "load its base model, merge it with PEFT" in str(refused.value)


def test_from_the_hub(directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def download(_hub_id: str, allow_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        return str(directories["dense_with"])

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(SourceError, match="an adapter lies beside the model"):
        open_source("somebody/model", need_weights=False)
    assert "adapter_config.json" in asked


def test_pickled_weights_are_a_model_too(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(SourceError, match="an adapter lies beside the model"):
        open_source(str(add_adapter(tmp_path)))
