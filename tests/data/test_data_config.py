"""The shipped options of `data=`."""

from __future__ import annotations

from typing import Any

import pytest
from omegaconf import OmegaConf
from pydantic import TypeAdapter, ValidationError

from upcycle.data.config import KINDS, MIXTURE, RATED, DataConfig
from upcycle.options.arguments import CONF

SHIPPED = {file.stem: file for file in sorted((CONF / "data").glob("*.yaml"))}
REQUIRED: dict[str, dict[str, Any]] = {
    "python_stdlib": {},
    "text": {"files": "*.txt"},
    "hf": {"path": "somewhere"},
    "mixture": {"domains": {"code": {"name": "python_stdlib", "weight": 1}}},
    "attributes": {"files": "*.jsonl", "attributes": ["helpfulness"]},
    "textblob": {},
    "vader": {},
}


def composed(name: str, **changes: Any) -> dict[str, Any]:
    plain: Any = OmegaConf.to_container(OmegaConf.merge(OmegaConf.load(SHIPPED[name]), REQUIRED[name], changes))
    return plain


def test_every_kind_ships() -> None:
    assert set(SHIPPED) == {*KINDS, MIXTURE, *RATED}


@pytest.mark.parametrize("name", SHIPPED)
def test_it_is_valid(name: str) -> None:
    config = TypeAdapter(DataConfig).validate_python(composed(name))
    assert config.name == name
    assert config.rated() if name in RATED else config.sources()


def test_the_default_is_that_of_the_dataclass() -> None:
    assert TypeAdapter(DataConfig).validate_python(composed("python_stdlib")) == DataConfig(name="python_stdlib")


@pytest.mark.parametrize(
    "changes", [{"fils": "x"}, {"domains": {"code": {"name": "text", "weight": 1, "held_out": 1}}}]
)
def test_unknown_options(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(DataConfig).validate_python(composed("mixture", **changes))


def test_the_yaml_of_a_mixture_is_an_example() -> None:
    example = next(line for line in SHIPPED["mixture"].read_text().splitlines() if "data.domains=" in line)
    domains = OmegaConf.to_container(OmegaConf.create("domains: " + example.split("=", 1)[1].strip("'")))
    assert isinstance(domains, dict)
    config = TypeAdapter(DataConfig).validate_python({"name": "mixture", **domains})
    assert config.weights() == {"python": 3, "prose": 1}
