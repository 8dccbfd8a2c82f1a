"""docs/scaling.md: every command runs, and its tables are what planning says today."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from documents import between, commands
from parallel.published import RUNS, folding, gpu
from transformers import LlamaConfig

from upcycle.parallel.roofline import estimate
from upcycle.parallel.search import search

if TYPE_CHECKING:
    from collections.abc import Callable

    from cli import Outcome
    from parallel.published import Run

pytest_plugins = ("tiny",)
ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs/scaling.md").read_text()
HUB_ID = "meta-llama/Meta-Llama-3-8B"
H100 = gpu("h100")


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
    layout = run.request(run.folding).step().layout
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
    rows = ["| model | GPUs | best published | rank among all | rank with its CP | MFU of it, of the first |"]
    rows += ["|---|---|---|---|---|---|"]
    for run in (run for run in RUNS if run.best):
        layout, found = run.request(run.folding).step().layout, search(run.request(folding()))
        every = [each.step.layout for each in found]
        same = [other for other in every if other.cp == layout.cp]
        places = (f"{some.index(layout) + 1} of {len(some)}" for some in (every, same))
        mfu = f"{estimated(run):.1f}, {100 * found[0].estimate.mfu:.1f}"
        cells = (run.model, run.gpus, degrees(run), *places, mfu)
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(rows) + "\n"


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
