"""A planned training step as tables."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from upcycle.parallel.communication import KINDS, communication
from upcycle.parallel.roofline import seconds

if TYPE_CHECKING:
    from upcycle.parallel.planning import Planned
    from upcycle.parallel.search import Candidate

SHOWN = 10
BEHIND = {"nothing": "nothing", "micro_batch": "a micro-batch", "step": "the step"}


def planned_table(planned: Planned) -> RenderableType:
    """Ranking (after a search), memory, communication and time."""
    parts: list[RenderableType] = [_ranking(planned)] if len(planned.ranking) > 1 else []
    parts += [_summary(planned), _memory(planned), _communication(planned), _time(planned.chosen)]
    return Group(*parts, Text("Time and MFU are estimates: docs/scaling.md says how far off they are."))


def _ranking(planned: Planned) -> Table:
    count = len(planned.ranking)
    table = Table(box=box.SIMPLE, title=f"layouts that fit, the fastest {min(SHOWN, count)} of {count}")
    for column in ("", "layout", "GB per GPU", "exposed", "bubble", "s per step", "MFU"):
        table.add_column(column, justify="left" if column == "layout" else "right", no_wrap=True)
    for place, each in enumerate(planned.ranking[:SHOWN], start=1):
        estimate = each.estimate
        table.add_row(
            str(place),
            each.step.layout.name,
            f"{each.memory.total / 1e9:.1f}",
            f"{sum(estimate.exposed.values()) / estimate.seconds:.1%}",
            f"{estimate.bubble / estimate.seconds:.1%}",
            _short(estimate.seconds),
            f"{estimate.mfu:.1%}",
        )
    return table


def _summary(planned: Planned) -> Table:
    step, request = planned.chosen.step, planned.request
    chunks = f", {step.chunks} model chunks per stage" if step.chunks > 1 else ""
    workload, estimate = request.workload, planned.chosen.estimate
    tokens = workload.sequences * workload.sequence_length
    table = Table(box=box.SIMPLE, show_header=False, title=step.layout.name)
    rows = [
        ("engine", "Megatron-Core" if step.layout.engine == "megatron" else "transformers: FSDP2 x TP x EP"),
        ("GPUs", f"{step.layout.world} {request.gpu.name}, {request.gpu.gpus_per_node} in a node"),
        ("step", f"{workload.sequences} sequences of {workload.sequence_length} tokens"),
        ("rank", f"{step.micro_batches} micro-batches of {workload.micro}{chunks}"),
        (
            "estimate",
            f"{_short(estimate.seconds)} s per step, {tokens / estimate.seconds:,.0f} tokens/s, MFU {estimate.mfu:.1%}",
        ),
    ]
    for row in rows:
        table.add_row(*row)
    return table


def _memory(planned: Planned) -> Table:
    memory = planned.chosen.memory
    fits = "fits" if planned.fits else "DOES NOT FIT"
    table = Table(box=box.SIMPLE, title=f"memory per GPU: {fits} in {planned.request.usable_memory / 1e9:.1f} GB")
    shown = {name: nbytes for name, nbytes in {**asdict(memory), "total": memory.total}.items() if nbytes}
    for name in shown:
        table.add_column(name, justify="right")
    table.add_row(*(f"{nbytes / 1e9:.2f} GB" for nbytes in shown.values()))
    return table


def _communication(planned: Planned) -> Table:
    step, gpu = planned.chosen.step, planned.request.gpu
    table = Table(box=box.SIMPLE, title="communication per GPU and step")
    for column in ("kind", "of", "ranks", "GB", "s", "hidden behind"):
        table.add_column(column, justify="right" if column in ("ranks", "GB", "s") else "left")
    found = communication(step)
    for traffic in sorted(found, key=lambda each: KINDS.index(each.kind)):
        local = traffic.group.in_a_node(gpu)
        ranks = f"{traffic.group.size}" if local == traffic.group.size else f"{traffic.group.size}, {local} a node"
        took = _short(seconds(traffic, gpu))
        table.add_row(traffic.kind, traffic.purpose, ranks, _short(traffic.nbytes / 1e9), took, BEHIND[traffic.behind])
    return table


def _time(chosen: Candidate) -> Table:
    estimate, compute = chosen.estimate, chosen.estimate.compute
    table = Table(box=box.SIMPLE, title="estimated time of a step")
    table.add_column("of")
    table.add_column("s", justify="right")
    table.add_column("share", justify="right")
    rows = {
        "matrix products outside the experts": compute.dense,
        "attention": compute.attention,
        "matrix products of the experts": compute.experts,
        "reading and writing activations": compute.memory,
        **{f"{kind}, not hidden": duration for kind, duration in estimate.exposed.items()},
        "pipeline bubble": estimate.bubble,
    }
    for name, duration in ((name, duration) for name, duration in rows.items() if duration):
        table.add_row(name, _short(duration), f"{duration / estimate.seconds:.1%}")
    return table


def _short(number: float) -> str:
    return f"{number:,.2f}" if number >= 1 else f"{number:.2g}"
