"""Kernels of experts against the dense FFN at equal active FLOPs, forward and forward+backward, on the CPU.

    python benchmarks/experts.py [--repeats 15] [--threads N] [--cpu-time] [--output FILE]

SmolLM2's shapes (hidden 576, FFN width 1536), 2,048 tokens, float32, random routing. Every repetition runs the dense
FFN and the kernels once, so that what else the machine does falls on all of them; a ratio compares medians or minima.
T experts of 1/G of the width cost T/G of the dense FLOPs, and the dense time is multiplied by that.
On a machine that others use too, `--threads 1 --cpu-time` counts only the seconds in which the process ran.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from environment import environment
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from upcycle.kernels.select import KERNELS

HIDDEN, WIDTH, TOKENS = 576, 1536, 2048
CASES = {"E8G1T1": (8, 1, 1), "E8G1T2": (8, 1, 2), "E8G8T8": (8, 8, 8)}  # E, G, T
# The reference is slow on purpose. Eager frees so much memory that what runs after it is slower: it runs apart.
TOGETHER = (("fused", "loop", "grouped_mm"), ("eager",))
WARM_UP = 2
Step = Callable[[], tuple[float, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="seconds of this process instead of wall-clock")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.cpu_time else time.perf_counter
    rows = [found for case in CASES for kernels in TOGETHER for found in measure(case, kernels, options.repeats, clock)]
    allocator = {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")}
    setting = {"threads": options.threads, "clock": clock.__name__, "repeats": options.repeats, "allocator": allocator}
    Console().print(table(rows, setting))
    if options.output:
        found = {"environment": environment(), **setting, "rows": rows}
        options.output.write_text(json.dumps(found, indent=2) + "\n")


def measure(case: str, kernels: tuple[str, ...], repeats: int, clock: Callable[[], float]) -> list[dict[str, Any]]:
    """Times of one case with some kernels, repetitions interleaved with the dense FFN's."""
    torch.manual_seed(0)
    expansion, granularity, top_k = CASES[case]
    x, direction = torch.randn(TOKENS, HIDDEN, requires_grad=True), torch.randn(TOKENS, HIDDEN)
    experts = make_experts(expansion * granularity, WIDTH // granularity)
    weights, index = torch.randn(TOKENS, experts.num_experts).softmax(-1).topk(top_k)
    arguments = (x, index, weights.requires_grad_())
    leaves = [x, weights, *experts.parameters()]
    steps = {"dense": dense_step(x, direction, clock)}
    for kernel in kernels:
        # `eager` is the module's own forward, which its decorator calls with this setting.
        forward = experts if kernel == "eager" else bound(kernel, experts)
        steps[kernel] = step(forward, arguments, leaves, direction, clock)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for _ in range(WARM_UP + repeats):
        for name, run in steps.items():
            times[name].append(run())
    dense, *others = (times[name][WARM_UP:] for name in steps)
    return [row(case, kernel, found, dense) for kernel, found in zip(kernels, others, strict=True)]


def make_experts(number: int, width: int) -> nn.Module:
    """Mixtral's experts, which are those of every gated type."""
    config = MixtralConfig(hidden_size=HIDDEN, intermediate_size=width, num_local_experts=number)
    config._experts_implementation = "eager"
    experts = MixtralExperts(config)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.04)
    return experts


def bound(kernel: str, experts: nn.Module) -> Callable[..., Tensor]:
    return lambda *arguments: KERNELS[kernel].forward(experts, *arguments)


def dense_step(x: Tensor, direction: Tensor, clock: Callable[[], float]) -> Step:
    """The FFN as dense models write it."""
    gate, up = (nn.Parameter(0.04 * torch.randn(WIDTH, HIDDEN)) for _ in range(2))
    down = nn.Parameter(0.04 * torch.randn(HIDDEN, WIDTH))

    def forward(x: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)

    return step(forward, (x,), [x, gate, up, down], direction, clock)


def step(
    forward: Callable[..., Tensor],
    arguments: tuple[Tensor, ...],
    leaves: list[Tensor],
    direction: Tensor,
    clock: Callable[[], float],
) -> Step:
    """Seconds of forward, and of forward and backward, into gradients that are None as after `zero_grad`."""

    def run() -> tuple[float, float]:
        for leaf in leaves:
            leaf.grad = None
        start = clock()
        output = forward(*arguments)
        middle = clock()
        output.backward(direction)
        return middle - start, clock() - start

    return run


def row(case: str, kernel: str, times: list[tuple[float, float]], dense: list[tuple[float, float]]) -> dict[str, Any]:
    _, granularity, top_k = CASES[case]
    found: dict[str, Any] = {"case": case, "kernel": kernel}
    for part, name in enumerate(("forward", "forward_backward")):
        for which, summary in (("median", statistics.median), ("min", min)):
            ours, equal_flops = (
                summary([t[part] for t in times]),
                summary([t[part] for t in dense]) * top_k / granularity,
            )
            found |= {f"{name}_{which}_ms": 1e3 * ours, f"{name}_{which}_ratio": ours / equal_flops}
    return found


def table(rows: list[dict[str, Any]], setting: dict[str, Any]) -> Table:
    titles = {"forward": "forward", "forward_backward": "both"}
    shown = Table(title=f"Experts against the dense FFN at equal active FLOPs, {TOKENS} tokens, float32\n{setting}")
    for column in (
        "case",
        "kernel",
        *(f"{title} {what}" for title in titles.values() for what in ("ms", "x", "min x")),
    ):
        shown.add_column(column, justify="left" if column in ("case", "kernel") else "right")
    for found in rows:
        cells = []
        for name in titles:
            cells += [f"{found[f'{name}_median_ms']:.1f}"]
            cells += [f"{found[f'{name}_{which}_ratio']:.2f}" for which in ("median", "min")]
        shown.add_row(found["case"], found["kernel"], *cells)
    return shown


if __name__ == "__main__":
    main()
