"""With model=upcycle each rank makes its own shard of the mixture: bit for bit what `upcycle convert` writes."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import models
import pytest
import torch
import training
from conversions import run as converted
from launching import on_ranks

from upcycle.models.load import load_checkpoint
from upcycle.train.models import conversion_request

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from upcycle.train.config import TrainConfig

pytest_plugins = ("text_model",)

LAYOUTS = {
    "fsdp2": (2, ("parallel=fsdp",)),
    "fsdp2 x ep2": (2, ("parallel=ep",)),
    "fsdp4 x ep2": (4, ("parallel=ep", "parallel.ep=2")),
    "fsdp2 x tp2 x ep4": (4, ("parallel=tp_ep",)),
    "hsdp2 x fsdp2 x ep2": (4, ("parallel=hsdp_ep",)),
}
MOE = ("moe.expansion=4", "moe.granularity=2", "moe.top_k=2")
CASES = {
    "qwen2_moe": MOE,
    "mixtral": (*MOE, "moe.router_order=topk_softmax"),
    "upcycled_moe": (*MOE, "target=upcycled_moe", "moe.shared_experts=1"),
    "drop": (*MOE, "init=drop"),
    "noise": (*MOE, "init=noise"),
    "qwen3_moe": (*MOE, "moe.router_order=topk_softmax"),
    "granitemoeshared": (*MOE, "target=granitemoeshared", "moe.router_order=topk_softmax", "moe.shared_experts=2"),
    "flex_olmo": MOE,
    "tied": (*MOE, "target=mixtral", "moe.router_order=topk_softmax"),
    "latent": (*MOE, "moe.latent=16"),
}
SOURCES = {"qwen3_moe": "qwen3", "flex_olmo": "olmo2", "tied": "llama_tied"}  # where it is not the Llama
FEW = ("fsdp2 x ep2", "fsdp2 x tp2 x ep4")  # for the last five
COMBINED = [(case, layout) for i, case in enumerate(CASES) for layout in (LAYOUTS if i < 5 else FEW)]


@pytest.fixture(scope="session")
def sources(text_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The dense model of every case."""
    place = tmp_path_factory.mktemp("dense")
    made = dict.fromkeys(CASES, text_model)
    for case, name in SOURCES.items():
        made[case] = models.save(models.build(name, vocab_size=300), place / name)
        for file in text_model.glob("tokenizer*"):
            (made[case] / file.name).write_bytes(file.read_bytes())
    return made


@pytest.fixture(scope="session")
def loaded(
    sources: dict[str, Path], text: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], tuple[TrainConfig, Path]]:
    """The options and the gathered model of every case in every layout."""
    place = tmp_path_factory.mktemp("online")
    made = {}
    for ranks in (2, 4):
        jobs: list[dict[str, Any]] = []
        for case, layout in COMBINED:
            size, overrides = LAYOUTS[layout]
            if size == ranks:
                given = ("model=upcycle", f"source='{sources[case]}'", *CASES[case], *overrides)
                config, file = training.options(text, place / "none", *given), place / f"{case}-{layout}.pt"
                jobs.append({"do": "start", "options": asdict(config), "file": str(file)})
                made[case, layout] = (config, file)
        on_ranks(ranks, jobs, place)
    return made


def written(config: TrainConfig, directory: Path) -> dict[str, Tensor]:
    """What `upcycle convert` writes, loaded by transformers."""
    output = converted(replace(conversion_request(config), output=str(directory / "moe"))).directory
    return {name: value for name, value in load_checkpoint(output).state_dict().items() if value.numel()}


@pytest.mark.parametrize(("case", "layout"), COMBINED)
def test_as_converted_and_loaded(case: str, layout: str, loaded: dict[Any, Any], tmp_path: Path) -> None:
    config, file = loaded[case, layout]
    expected, found = written(config, tmp_path), torch.load(file, weights_only=True)
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


# A rank reads the whole of a shard that it holds a projection of.
@pytest.mark.parametrize(("case", "layout"), [each for each in COMBINED if each[0] != "latent"])
def test_a_rank_reads_what_it_holds(case: str, layout: str, loaded: dict[Any, Any]) -> None:
    """float32 values of the source, each once: what a rank holds, without routers and gates, which are drawn."""
    _, file = loaded[case, layout]
    whole = sum(value.numel() for value in torch.load(file, weights_only=True).values())
    for rank in json.loads(file.with_suffix(".json").read_text()):
        assert rank["bytes_read"] <= 4 * rank["elements"]
        assert rank["elements"] < 0.6 * whole
        assert rank["bytes_read"] > 4 * 0.9 * rank["elements"]
