"""Training on many ranks is training: losses and weights are those of one process, in float32."""

from __future__ import annotations

import functools
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import models
import pytest
import torch
import training
from launching import on_ranks
from transformers import OlmoeConfig, OlmoeForCausalLM

from upcycle.routing.ties import is_tied
from upcycle.train.checkpoints import read_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from pathlib import Path

pytest_plugins = ("text_model",)

# The order of float32 sums is all that may differ; the largest differences seen are 6e-7 and 2e-7.
LOSS, WEIGHT = 5e-6, 2e-6
LAYOUTS = {
    "fsdp2": (2, ("parallel=fsdp",)),
    "fsdp2 x ep2": (2, ("parallel=ep",)),
    "fsdp2 x tp2 x ep4": (4, ("parallel=tp_ep",)),
    "hsdp2 x fsdp2 x ep2": (4, ("parallel=hsdp_ep",)),
    # Experts that are both spread and sharded.
    "fsdp4 x ep2": (4, ("parallel=ep", "parallel.ep=2")),
    "fsdp2 x tp2 x ep2": (4, ("parallel=tp_ep", "parallel.ep=2")),
}
DATA_RANKS = dict(zip(LAYOUTS, (2, 2, 2, 4, 4, 2), strict=True))
UPCYCLE = ("model=upcycle", "moe.expansion=8", "moe.granularity=1", "moe.top_k=2", "init.router_std=0.1")
GROUPED = ("model=upcycle", "moe.expansion=2", "moe.granularity=4", "moe.top_k=4", "init.router_std=0.1")
TYPES = {
    "qwen3_moe": (*UPCYCLE, "moe.router_order=topk_softmax"),
    "qwen2_moe": UPCYCLE,
    "mixtral": (*UPCYCLE, "moe.router_order=topk_softmax"),
    "upcycled_moe": (*UPCYCLE, "target=upcycled_moe", "moe.shared_experts=1", "balance.bias_update=0.001"),
    "olmoe": ("model=checkpoint",),
    "dense": ("model=dense",),
    "shared": (*UPCYCLE, "target=qwen2_moe", "moe.shared_experts=1"),
    "tied": (*UPCYCLE, "target=mixtral", "moe.router_order=topk_softmax"),
    "latent": (*UPCYCLE, "target=upcycled_moe", "moe.latent=16"),
    # Four rows a group: a rank of four holds half of one.
    "groups_tied": (*GROUPED, "moe.groups=tied"),
    "groups_whole": (*GROUPED, "moe.groups=whole"),
    "groups_positions": (*GROUPED, "moe.groups=positions", "balance.bias_update=0.001"),
    "hybrid": (*UPCYCLE, "balance.bias_update=0.001"),
    "hybrid_dense": ("model=dense",),
    "groups_released": (*GROUPED, "moe.groups=whole", "router.release={until: 0.5, then: positions}"),
}
HOLDING = [kind for kind in TYPES if kind.startswith("groups_")]
MAIN_LAYOUTS, MAIN_TYPES = list(LAYOUTS)[:4], list(TYPES)[:6]
CASES = [(kind, layout) for kind in MAIN_TYPES for layout in MAIN_LAYOUTS]
CASES += [(kind, layout) for kind in ("shared", "tied", "latent") for layout in ("fsdp2 x ep2", "fsdp2 x tp2 x ep4")]
CASES += [(kind, layout) for kind in ("qwen2_moe", "upcycled_moe") for layout in ("fsdp4 x ep2", "fsdp2 x tp2 x ep2")]
CASES += [(kind, layout) for kind in HOLDING for layout in ("fsdp2 x ep2", "fsdp2 x tp2 x ep4")]
CASES += [("hybrid", layout) for layout in ("fsdp2", "fsdp2 x ep2")] + [("hybrid_dense", "fsdp2")]
MUTANTS = {
    "loads of one rank": "fsdp2 x ep2",
    "clipping by one rank's norm": "fsdp2 x ep2",
    "metrics of one rank": "fsdp2 x ep2",
    "gradients of experts that no rank divides": "fsdp2 x ep2",
    "the same data for all replicas": "hsdp2 x fsdp2 x ep2",
}
# Adam divides by the gradient's own size: at its usual eps a rounding error in one that is nearly 0 is a whole step.
COMMON = (
    "budget.steps=3",
    "batch.sequences=8",
    "balance.statistics=global_batch",
    "balance.z_loss=0.001",
    "optim.eps=1e-3",
    "optim.clip=0.5",
    "validation.windows=5",
    "schedule.warmup=1",
    "metrics=dense",
)


@pytest.fixture(scope="session")
def sources(text_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What each type starts from."""
    place = tmp_path_factory.mktemp("sources")
    qwen3 = models.save(models.build("qwen3", vocab_size=300), place / "qwen3")
    olmoe = OlmoeForCausalLM(
        OlmoeConfig(
            vocab_size=300,
            hidden_size=32,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            num_experts=8,
            num_experts_per_tok=2,
            max_position_embeddings=64,
            eos_token_id=2,
        )
    )
    models.save(olmoe, place / "olmoe")
    tied = models.save(models.build("llama_tied", vocab_size=300), place / "tied")
    hybrid = models.save(models.build("nemotron_h", vocab_size=300), place / "hybrid")
    for file in text_model.glob("tokenizer*"):
        for directory in (qwen3, place / "olmoe", tied, hybrid):
            (directory / file.name).write_bytes(file.read_bytes())
    own = {"qwen3_moe": qwen3, "olmoe": place / "olmoe", "tied": tied, "hybrid": hybrid, "hybrid_dense": hybrid}
    return {name: text_model for name in TYPES} | own


@pytest.fixture(scope="session")
def alone(sources: dict[str, Path], text: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns the run of one process, made on first use."""
    place = tmp_path_factory.mktemp("alone")

    def made(kind: str) -> Path:
        given = (f"source='{sources[kind]}'", *TYPES[kind], *COMMON, "batch.micro=4")
        training.run(training.options(text, place / kind, *given))
        return place / kind

    return functools.cache(made)


def job(kind: str, layout: str, source: Path, text: Path, output: Path, *changes: str, **more: Any) -> dict[str, Any]:
    """A run over the ranks of a layout, with as many micro-batches as the one process makes."""
    given = (f"source='{source}'", *TYPES[kind], *COMMON, f"batch.micro={4 // DATA_RANKS[layout]}", *LAYOUTS[layout][1])
    return {"do": "run", "options": asdict(training.options(text, output, *given, *changes)), **more}


@pytest.fixture(scope="session")
def runs(
    sources: dict[str, Path], text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], dict[tuple[str, str], Path]]:
    """Returns the runs of all cases and mutants on so many ranks, made together on first use."""

    def made(ranks: int) -> dict[tuple[str, str], Path]:
        place = tmp_path_factory.mktemp(f"ranks{ranks}")
        cases = [case for case in CASES if LAYOUTS[case[1]][0] == ranks]
        outputs = {(kind, layout): place / f"{kind}-{layout}" for kind, layout in cases}
        jobs = [job(kind, layout, sources[kind], text, output) for (kind, layout), output in outputs.items()]
        for number, (mutant, layout) in enumerate(MUTANTS.items()):
            if LAYOUTS[layout][0] == ranks:
                output = outputs[mutant, layout] = place / f"mutant{number}"
                jobs.append(job("qwen2_moe", layout, sources["qwen2_moe"], text, output, change=mutant))
        on_ranks(ranks, jobs, place)
        return outputs

    return functools.cache(made)


def difference(one: Path, other: Path, *, but: Collection[str] = ()) -> tuple[float, float]:
    """Largest difference of what two runs recorded, but for some metrics, and of their weights."""
    rows = list(zip(training.rows(one), training.rows(other), strict=True))
    for ours, theirs in rows:
        assert ours.keys() == theirs.keys()
    losses = max(_apart(ours[name], theirs[name]) for ours, theirs in rows for name in ours if name not in but)
    weights = [read_checkpoint(run / "checkpoints/last.ckpt")["state_dict"] for run in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    apart = [(weights[0][name] - weights[1][name]).abs().max() for name in weights[0] if weights[0][name].numel()]
    return losses, float(torch.stack(apart).max())


def _apart(one: Any, other: Any) -> float:
    if isinstance(one, list):
        return max(_apart(a, b) for a, b in zip(one, other, strict=True))
    return abs(one - other) / max(1.0, abs(one))


def assert_same(one: Path, other: Path, *, but: Collection[str] = ()) -> None:
    """The one assertion of parity, which every mutant must fail."""
    losses, weights = difference(one, other, but=but)
    assert losses <= LOSS
    assert weights <= WEIGHT


@pytest.mark.parametrize(("kind", "layout"), CASES)
def test_as_in_one_process(
    kind: str, layout: str, runs: Callable[[int], dict[tuple[str, str], Path]], alone: Callable[[str], Path]
) -> None:
    run = runs(LAYOUTS[layout][0])[kind, layout]
    assert_same(run, alone(kind))
    if kind == "groups_tied":
        state = read_checkpoint(run / "checkpoints/last.ckpt")["state_dict"]
        routers = [weight for name, weight in state.items() if name.endswith("mlp.gate.weight")]
        assert routers
        assert all(is_tied(weight, 4) for weight in routers)


@pytest.mark.parametrize(("mutant", "layout"), MUTANTS.items())
def test_mutants_are_rejected(
    mutant: str, layout: str, runs: Callable[[int], dict[tuple[str, str], Path]], alone: Callable[[str], Path]
) -> None:
    with pytest.raises(AssertionError):
        assert_same(runs(LAYOUTS[layout][0])[mutant, layout], alone("qwen2_moe"))
