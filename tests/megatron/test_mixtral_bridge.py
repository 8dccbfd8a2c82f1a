"""The names in the bridge for mixtral, read with stand-ins for Megatron, against those of a checkpoint."""

from __future__ import annotations

import sys
from itertools import product
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
from recipes import EXPERTS, checkpoint, request
from safetensors import safe_open

from upcycle.megatron.export import export_recipe

if TYPE_CHECKING:
    from pathlib import Path

pytest_plugins = ("text_model",)
LAYERS = 2
STAND_INS = {
    "megatron.bridge.models.conversion.mapping_registry": "MegatronMappingRegistry",
    "megatron.bridge.models.conversion.model_bridge": "MegatronModelBridge",
    "megatron.bridge.models.conversion.param_mapping": "AutoMapping GatedMLPMapping QKVMapping",
    "megatron.core.models.gpt.gpt_model": "GPTModel",
}


class Mapping:
    """The names that a mapping of Megatron-Bridge is made with."""

    def __init__(self, *, megatron_param: str, **names: str) -> None:
        self.ours, self.theirs = megatron_param, list(names.values())


class Bridge:
    """Megatron-Bridge's base class, as far as it is needed to read names."""

    @staticmethod
    def register_bridge(**_: Any) -> Any:
        return lambda bridge: bridge


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, text_model: Path) -> Path:
    root = tmp_path_factory.mktemp("mixtral")
    return export_recipe(request(root / "recipe", moe=checkpoint("mixtral", root / "moe", tokenizer=text_model)))


def mappings(text: str, monkeypatch: pytest.MonkeyPatch) -> list[Mapping]:
    """What a bridge's registry is made of."""
    classes = {"MegatronModelBridge": Bridge, "MegatronMappingRegistry": lambda *given: list(given), "GPTModel": object}
    for name, exported in STAND_INS.items():
        module = ModuleType(name)
        for each in exported.split():
            setattr(module, each, classes.get(each, Mapping))
        monkeypatch.setitem(sys.modules, name, module)
    namespace: dict[str, Any] = {}
    exec(compile(text, "mixtral_bridge.py", "exec"), namespace)
    found: list[Mapping] = namespace["MixtralBridge"]().mapping_registry()
    return found


def expanded(pattern: str) -> set[str]:
    """The names that a pattern of layers, or of layers and experts, stands for."""
    ranges = [range(LAYERS), range(EXPERTS)][: pattern.count("*")]
    names = set()
    for numbers in product(*ranges):
        name = pattern
        for number in numbers:
            name = name.replace("*", str(number), 1)
        names.add(name)
    return names


def bridged(text: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found = mappings(text, monkeypatch)
    return sorted(name for mapping in found for pattern in mapping.theirs for name in expanded(pattern))


def test_every_tensor_of_a_checkpoint_is_named_once(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with safe_open(recipe / "model.safetensors", "pt") as file:
        names = sorted(file.keys())
    text = (recipe / "mixtral_bridge.py").read_text()
    assert bridged(text, monkeypatch) == names
    for mapping in mappings(text, monkeypatch):
        assert {name.count("*") for name in mapping.theirs} == {mapping.ours.count("*")}


@pytest.mark.parametrize(
    ("before", "after"), [("block_sparse_moe.experts.*.w3", "mlp.experts.*.w3"), ("*.w3.weight", "*.w1.weight")]
)
def test_a_wrong_name_is_noticed(recipe: Path, monkeypatch: pytest.MonkeyPatch, before: str, after: str) -> None:
    """The mutants of the test above."""
    with safe_open(recipe / "model.safetensors", "pt") as file:
        names = sorted(file.keys())
    text = (recipe / "mixtral_bridge.py").read_text()
    assert text.count(before) == 1
    assert bridged(text.replace(before, after), monkeypatch) != names
