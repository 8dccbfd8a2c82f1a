"""docs/scaling.md: every command runs, and its tables are what planning says today."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from documents import between, commands
from parallel.published import MODELS, RUNS, folding, gpu, workload
from transformers import LlamaConfig

from upcycle.errors import ConfigError
from upcycle.parallel.config import ParallelConfig
from upcycle.parallel.roofline import estimate
from upcycle.parallel.search import Request, search

if TYPE_CHECKING:
    from collections.abc import Callable

    from cli import Outcome
    from parallel.published import Run

    from upcycle.parallel.config import AnyParallel
    from upcycle.parallel.search import Candidate
    from upcycle.parallel.step import Step

pytest_plugins = ("tiny",)
ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs/scaling.md").read_text()
HUB_ID = "meta-llama/Meta-Llama-3-8B"
H100 = gpu("h100")
OWN = ParallelConfig(fsdp=None, tp=None, ep=None, replicate=None)
FINE = {"experts": 64, "top_k": 8}
LLAMA_8B = MODELS["Llama 3 8B E8T2"]
LLAMA_1B = replace(
    LLAMA_8B, layers=16, moe_layers=16, hidden=2048, head_size=64, ffn_width=8192, expert_width=8192, tied=True
)
DECIDED = {
    **MODELS,
    "Llama 3 8B E8G8T8": replace(LLAMA_8B, **FINE, expert_width=14336 // 8),
    "Llama 3.2 1B E8T2": LLAMA_1B,
    "Llama 3.2 1B E8G8T8": replace(LLAMA_1B, **FINE, expert_width=8192 // 8),
}
DECISIONS = [
    ("Llama 3.2 1B E8T2", 8),
    ("Llama 3.2 1B E8G8T8", 8),
    ("Llama 3 8B E8T2", 16),
    ("Llama 3 8B E8T2", 128),
    ("Llama 3 8B E8G8T8", 16),
    ("Llama 3 8B E8G8T8", 64),
    ("Qwen2-57B-A14B", 16),
    ("Qwen2-57B-A14B", 64),
    ("Mixtral 8x22B", 128),
    ("Mixtral 8x22B-G8T8", 16),
    ("Mixtral 8x22B-G8T8", 32),
    ("Mixtral 8x22B-G8T8", 64),
    ("Mixtral 8x22B-G8T8", 128),
    ("Llama3-8x70B", 256),
]


def test_commands_run(upcycle: Callable[..., Outcome], tmp_path: Path) -> None:
    """With the config of Llama 3 8B instead of the Hub's, and a GPU of one's own."""
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        dtype="bfloat16",
    )
    config.save_pretrained(tmp_path / "llama")
    (tmp_path / "ours.yaml").write_text((ROOT / "conf/gpu/h100.yaml").read_text())
    lines = [line for line in commands(TEXT) if line.startswith("upcycle plan ")]  # tests/distributed runs the others
    assert len(lines) > 3
    for line in lines:
        changed = line.replace(HUB_ID, str(tmp_path / "llama")).replace("ours.yaml", str(tmp_path / "ours.yaml"))
        words = shlex.split(changed)
        outcome = upcycle(*words[1:])
        assert outcome.status == 0, f"{line}\n{outcome.out}\n{outcome.err}"


def degrees(run: Run) -> str:
    return degrees_of(run.request(run.folding).step())


def degrees_of(step: Step) -> str:
    layout = step.layout
    return f"TP{layout.tp} CP{layout.cp} PP{layout.pp} ETP{layout.etp} EP{layout.ep}"


def estimated(run: Run) -> float:
    return 100 * estimate(run.request(run.folding).step(), H100).mfu


def estimates() -> str:
    rows = ["| model | GPUs | folding | sequences x tokens | published | estimated | off by | source |"]
    rows += ["|---|---|---|---|---|---|---|---|"]
    for run in RUNS:
        found = estimated(run)
        batch = f"{run.sequences:,} x {run.length:,}"
        off = f"{found / run.mfu - 1:+.0%}"
        cells = (run.model, run.gpus, degrees(run), batch, f"{run.mfu:.1f}", f"{found:.1f}", off, run.source)
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(rows) + "\n"


def ranks() -> str:
    rows = ["| model | GPUs | best published | rank | MFU of it, of the first |"]
    rows += ["|---|---|---|---|---|"]
    for run in (run for run in RUNS if run.best):
        layout, found = run.request(run.folding).step().layout, search(run.request(folding()))
        place = [each.step.layout for each in found].index(layout) + 1
        mfu = f"{estimated(run):.1f}, {100 * found[0].estimate.mfu:.1f}"
        cells = (run.model, run.gpus, degrees(run), f"{place} of {len(found)}", mfu)
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(rows) + "\n"


def request(model: str, gpus: int, parallel: AnyParallel, *, recompute: bool) -> Request:
    step = workload(recompute=recompute)
    return Request(parallel=parallel, sizes=DECIDED[model], workload=step, gpu=H100, nodes=gpus // 8)


def first(asked: Request) -> Candidate | None:
    """The fastest that fits."""
    try:
        return search(asked)[0]
    except ConfigError:
        return None


def own(model: str, gpus: int) -> tuple[str, str]:
    """This library's engine: the least memory of all its layouts, and the MFU of the fastest that fits."""
    asked = request(model, gpus, OWN, recompute=True)
    least = min(each.memory.total for each in search(replace(asked, gpu=replace(H100, memory=1e15))))
    found = first(asked)
    assert bool(found) == (least <= asked.usable_memory)
    fits = "" if found else ", does not fit"
    return f"{least / 1e9:.1f}{fits}", f"{100 * found.estimate.mfu:.1f}" if found else "–"


def megatron(model: str, gpus: int) -> tuple[str, str, str]:
    """Megatron's fastest folding, its memory and its MFU."""
    found = first(request(model, gpus, folding(), recompute=False))
    again = None if found else first(request(model, gpus, folding(), recompute=True))
    chosen = found or again
    if not chosen:
        return "none fits", "–", "–"
    recomputing = ", recomputing" if again else ""
    memory, mfu = f"{chosen.memory.total / 1e9:.1f}", f"{100 * chosen.estimate.mfu:.1f}"
    return degrees_of(chosen.step) + recomputing, memory, mfu


def decisions() -> str:
    rows = ["| model | GPUs | this engine: GB at least | MFU | Megatron: fastest folding | GB | MFU | MFU is |"]
    rows += ["|---|---|---|---|---|---|---|---|"]
    for model, gpus in DECISIONS:
        same = [run for run in RUNS if run.best and (run.model, run.gpus, run.length) == (model, gpus, 4096)]
        known = ["estimated", *(f"{run.mfu:.1f} published of {degrees(run)}" for run in same)]
        cells = (model, gpus, *own(model, gpus), *megatron(model, gpus), "; ".join(known))
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(rows) + "\n"


def test_the_decisions_are_those_of_today() -> None:
    assert between(TEXT, "decisions") == decisions()


@pytest.mark.parametrize("model", DECIDED)
def test_the_floor_of_memory_is_the_one_that_is_stated(model: str) -> None:
    """16 bytes times the experts' parameters over the number of experts, however many GPUs; half more is the rest."""
    sizes = DECIDED[model]
    experts = sizes.moe_layers * sizes.experts * 3 * sizes.hidden * sizes.expert_width
    floor = 16 * experts / sizes.experts / 1e9
    least = [float(own(model, gpus)[0].split(",")[0]) for gpus in (64, 128, 256)]
    assert floor <= least[0] <= 1.5 * floor + 10
    assert len(set(least)) == 1


def test_the_estimates_are_those_of_today() -> None:
    assert between(TEXT, "estimates") == estimates()


def test_the_ranks_are_those_of_today() -> None:
    assert between(TEXT, "ranks") == ranks()


def test_options_that_are_named_exist(upcycle: Callable[..., Outcome]) -> None:
    shown = upcycle("plan", "--help").out
    for option in set(re.findall(r"`workload\.([a-z_]+)", TEXT)):
        assert re.search(rf"^ +{option}:", shown, flags=re.MULTILINE), option
    for layout in set(re.findall(r"`parallel=([a-z_]+)", TEXT)):
        assert (ROOT / f"conf/parallel/{layout}.yaml").is_file(), layout
