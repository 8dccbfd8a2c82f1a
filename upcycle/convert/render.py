"""The plan for people (rich tables) and for programs (JSON)."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from upcycle.checkpoint import dtype_bytes
from upcycle.plan.latent import latent_start
from upcycle.plan.plan import Plan, plan_dict

if TYPE_CHECKING:
    from upcycle.arch.moe import MoeShape
    from upcycle.convert.prepare import Conversion
    from upcycle.plan.cost import Cost
    from upcycle.plan.effort import Effort

MIXERS = {"attention": "attention", "mamba2": "Mamba-2"}


def plan_json(conversion: Conversion) -> dict[str, Any]:
    """Everything that the table says and every tensor's provenance."""
    source = conversion.source
    return {
        "source": {"given": source.given, "model_type": source.model.family.model_type},
        **plan_dict(conversion.plan),
        "cost": asdict(conversion.cost),
        "effort": asdict(conversion.effort),
        "disk_free": conversion.free,
        "files": {shard.file: shard.nbytes for shard in conversion.shards},
        "fingerprint": conversion.plan.fingerprint(),
    }


def plan_table(conversion: Conversion) -> RenderableType:
    """Summary, layers, and what the user should know."""
    return Group(_summary(conversion), _layers(conversion), *_remarks(conversion.plan))


def _summary(conversion: Conversion) -> Table:
    plan, cost, effort, model = conversion.plan, conversion.cost, conversion.effort, conversion.source.model
    table = Table(box=box.SIMPLE, show_header=False, title=f"{conversion.source.path.name} -> {plan.moe.name}")
    moe = plan.moe
    layers = f"{len(moe.layers)} of {model.layers} layers"
    flops = cost.flops_per_token / cost.dense_flops_per_token
    rows = [
        ("target", plan.target),
        ("experts", f"{moe.experts} of width {moe.expert_width}, {moe.top_k} active{_shared(moe)}; {layers}"),
        *_latent(plan, model.hidden_size),
        ("router", f"{moe.router_order}, std {plan.router_std:g}{_groups(moe)}"),
        ("init", f"{plan.init.name}, scaling {plan.init.scaling}"),
        ("step 0", "lossless" if not plan.losses else "not lossless"),
        ("parameters", f"{cost.parameters:,} ({cost.active_parameters:,} active); dense {cost.dense_parameters:,}"),
        ("FLOPs per token", f"{cost.flops_per_token:,} in matrix products forward, {flops:.3f} x dense"),
        *_ahead(cost),
        *_padding(cost),
        ("to write", f"{cost.bytes_to_write / 1e9:.3f} GB in {_count(len(conversion.shards), 'file')}"),
        ("disk free", f"{conversion.free / 1e9:.1f} GB"),
        ("peak memory", f"at most {effort.peak_memory / 1e9:.2f} GB anonymous, {_count(effort.workers, 'worker')}"),
        ("time", f"about {duration(effort.estimated_seconds)} on one machine, an extrapolation: {_origin(effort)}"),
    ]
    for row in rows:
        table.add_row(*row)
    return table


def _shared(moe: MoeShape) -> str:
    made_of = {"copies": "copies", "part": "its own part", "whole": "all"}[moe.shared]
    return f", a shared one of width {moe.shared_width}, {made_of} of the FFN" if moe.shared_width else ""


def _latent(plan: Plan, hidden_size: int) -> list[tuple[str, str]]:
    """The size in which routed experts compute, where one was asked for."""
    if plan.moe.latent is None:
        return []
    start = latent_start(plan.moe.latent, plan.init, hidden_size) or "identities"
    return [("latent", f"routed experts compute in {plan.moe.latent} of {hidden_size} dimensions, {start}")]


def _ahead(cost: Cost) -> list[tuple[str, str]]:
    """What of the parameters no forward pass of the model itself uses."""
    if not cost.ahead_parameters:
        return []
    said = "of the parameters, and none of the active ones; layouts of ranks leave them out"
    return [("multi-token prediction", f"{cost.ahead_parameters:,} {said}")]


def _padding(cost: Cost) -> list[tuple[str, str]]:
    """What is counted in none of the lines before."""
    if not cost.padding_bytes:
        return []
    zeros = f"{cost.padding_parameters:,} zeros, {cost.padding_flops_per_token:,} FLOPs per token"
    return [("portable", f"{zeros}, {cost.padding_bytes / 1e9:.3f} GB: for other engines, and never trained")]


def _groups(moe: MoeShape) -> str:
    return f", groups {moe.groups}" if moe.granularity > 1 else ""


def duration(seconds: float) -> str:
    """Seconds for a person."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:,.1f} h"


def _origin(effort: Effort) -> str:
    rate = effort.extrapolated_from
    return f"{rate.bytes_per_second / 1e9:.3f} GB/s per worker, measured on {rate.machine}, {rate.date}"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def _layers(conversion: Conversion) -> Table:
    plan = conversion.plan
    table = Table(box=box.SIMPLE, title="layers")
    for column in ("layers", "kind", "tensors", "MB per layer", "gate x", "up x", "down x", "output x"):
        table.add_column(column, justify="left" if column in ("layers", "kind") else "right")
    for indices, cells in _runs(conversion):
        name = str(indices[0]) if len(indices) == 1 else f"{indices[0]}-{indices[-1]}"
        table.add_row(name, *cells)
    ahead = [tensor for tensor in plan.tensors if tensor.kind == "ahead"]
    outside = [tensor for tensor in plan.tensors if tensor.layer is None and tensor.kind != "ahead"]
    for name, kind, tensors in (
        ("ahead", "multi-token prediction", ahead),
        ("outside", "embeddings, head, norm", outside),
    ):
        if tensors:
            table.add_row(name, kind, str(len(tensors)), _megabytes(tensors), "", "", "", "")
    return table


def _runs(conversion: Conversion) -> list[tuple[list[int], tuple[str, ...]]]:
    """Neighbouring layers with the same row, together."""
    by_layer: dict[int, list[Any]] = {layer: [] for layer in range(conversion.source.model.layers)}
    for tensor in conversion.plan.tensors:
        if tensor.layer is not None:
            by_layer[tensor.layer].append(tensor)
    runs: list[tuple[list[int], tuple[str, ...]]] = []
    for layer, tensors in by_layer.items():
        cells = (*_kind(conversion, layer, tensors), *_factors(conversion.plan, layer))
        if runs and runs[-1][1] == cells:
            runs[-1][0].append(layer)
        else:
            runs.append(([layer], cells))
    return runs


def _kind(conversion: Conversion, layer: int, tensors: list[Any]) -> tuple[str, str, str]:
    kind, mixer = "dense FFN", conversion.source.model.kind(layer).mixer
    if layer in conversion.plan.scaling:
        kind = "MoE" + (" + shared" if conversion.plan.moe.shared_width else "")
    elif layer not in conversion.source.model.ffn_layers:
        kind = MIXERS[mixer] if mixer else kind
    return kind, str(len(tensors)), _megabytes(tensors)


def _factors(plan: Plan, layer: int) -> tuple[str, ...]:
    if layer not in plan.scaling:
        return ("", "", "", "")
    scaling = plan.scaling[layer]
    matrices = (f"{scaling.matrix[role]:g}" if role in scaling.matrix else "-" for role in ("gate", "up", "down"))
    return (*matrices, f"{scaling.output:g}")


def _megabytes(tensors: list[Any]) -> str:
    return f"{sum(math.prod(t.shape) * dtype_bytes(t.dtype) for t in tensors) / 1e6:.1f}"


def _remarks(plan: Plan) -> list[Text]:
    lines = [f"why {plan.target}: {plan.why[0]}", *(f"  not {reason}" for reason in plan.why[1:])]
    lines += [f"engine {each}" for each in plan.serving]
    lines += [f"step 0 differs: {reason}" for reason in plan.losses]
    lines += [f"note: {note}" for note in plan.notes]
    lines += [f"dropped: {name} ({reason})" for name, reason in list(plan.dropped.items())[:5]]
    return [Text(line) for line in lines]
