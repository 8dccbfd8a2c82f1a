"""Whether a layout fits the world, the model and the batch; says what does when it does not. Knows no torch."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from upcycle.errors import ConfigError, nearest
from upcycle.parallel.config import FoldingConfig
from upcycle.parallel.folding import Folding
from upcycle.parallel.rank_layout import check_experts, check_heads, divisors, resolve

if TYPE_CHECKING:
    from upcycle.parallel.config import ParallelConfig, WorkloadConfig
    from upcycle.parallel.gpu import Gpu
    from upcycle.parallel.sizes import Mamba, ModelSizes


def checked_layout(
    config: ParallelConfig | FoldingConfig, sizes: ModelSizes, workload: WorkloadConfig, gpu: Gpu, nodes: int
) -> Folding:
    """The layout that the options ask for.

    Raises:
        ConfigError: it fits the world, the model or the batch not.
    """
    check_ranges(config, workload)
    lay_out: Any = _folding if isinstance(config, FoldingConfig) else _fsdp
    layout: Folding = lay_out(config, sizes, gpu, nodes)
    _check_batch(layout, workload)
    return layout


def _folding(config: FoldingConfig, sizes: ModelSizes, gpu: Gpu, nodes: int) -> Folding:
    tp, cp, pp, etp, ep = (getattr(config, name) or 1 for name in ("tp", "cp", "pp", "etp", "ep"))
    world, attention, moe = nodes * gpu.gpus_per_node, tp * cp * pp, etp * ep * pp
    _check_world(math.lcm(attention, moe), gpu, nodes, "tp * cp * pp and of etp * ep * pp")
    _divides("tp", tp, "heads of keys and values", sizes.kv_heads)
    _divides("tp", tp, "width of the FFN", sizes.ffn_width if sizes.count("dense") else 0)
    if sizes.mamba:
        _split_mamba(sizes.mamba, tp, cp)
    _divides("tp", tp, "width of the shared experts", sizes.shared_width)
    _divides("pp", pp, "layers", sizes.layers)
    _divides("etp", etp, "width of an expert", sizes.expert_width)
    _divides("ep", ep, "experts", sizes.experts)
    return Folding(engine="megatron", tp=tp, cp=cp, dp=world // attention, pp=pp, etp=etp, ep=ep, edp=world // moe)


def _split_mamba(mamba: Mamba, tp: int, cp: int) -> None:
    """Check that TP and CP give every rank heads, and whole groups or heads of one (megatron/core/ssm, 0.19.2)."""
    _divides("tp", tp, "heads of Mamba-2", mamba.heads)
    _divides("tp", tp, "groups of Mamba-2", mamba.groups)
    heads, groups = mamba.heads // tp, mamba.groups // tp
    _divides("cp", cp, "heads of Mamba-2 that tp leaves a rank", heads)
    if max(cp, groups) % min(cp, groups):
        possible = [ways for ways in divisors(heads) if max(ways, groups) % min(ways, groups) == 0]
        raise ConfigError(
            "parallel.cp neither divides the groups of Mamba-2 that tp leaves a rank, nor is a multiple of them",
            found=f"cp {cp}, {groups} groups",
            remedy=f"set parallel.cp to {nearest(cp, possible)}",
        )


def _fsdp(config: ParallelConfig, sizes: ModelSizes, gpu: Gpu, nodes: int) -> Folding:
    ranks = resolve(config, nodes * gpu.gpus_per_node)
    check_experts(ranks, sizes.experts)
    check_heads(ranks, sizes.kv_heads, sizes.experts)
    edp = ranks.ranks // ranks.ep
    return Folding(engine="transformers", tp=ranks.tp, dp=ranks.data, ep=ranks.ep, edp=edp, replicate=ranks.replicate)


def check_ranges(config: ParallelConfig | FoldingConfig, workload: WorkloadConfig) -> None:
    """Check that every degree and size is positive.

    Raises:
        ConfigError: one is not.
    """
    for group, options in (("parallel", config), ("workload", workload)):
        for name in (field.name for field in fields(options)):
            value = getattr(options, name)
            if value is not None and not isinstance(value, bool) and value < 1:
                raise ConfigError(f"{group}.{name} is out of range", found=value, expected="1 or more")


def _divides(name: str, ways: int, what: str, size: int) -> None:
    if size % ways:
        raise ConfigError(
            f"parallel.{name} does not divide the {what}",
            found=f"{size} % {name} {ways} = {size % ways}",
            expected=f"a divisor of {size}",
            remedy=f"set parallel.{name} to {nearest(ways, divisors(size))}",
        )


def _check_world(unit: int, gpu: Gpu, nodes: int, product: str) -> None:
    world, step = nodes * gpu.gpus_per_node, unit // math.gcd(unit, gpu.gpus_per_node)
    if world % unit:
        raise ConfigError(
            "the layout does not fit the number of GPUs",
            found=f"nodes {nodes} * {gpu.gpus_per_node} = {world} GPUs",
            expected=f"a multiple of {product}, here {unit}",
            remedy=f"set nodes to {nearest(nodes, range(step, nodes + step + 1, step))}",
        )


def _check_batch(layout: Folding, workload: WorkloadConfig) -> None:
    ranks = layout.dp * workload.micro
    _multiple("sequences", workload.sequences, ranks, f"dp {layout.dp} * micro {workload.micro}")
    if layout.engine == "megatron":
        # Ring attention gives every rank a slice from either end of the sequence.
        ways = layout.tp * layout.cp * (2 if layout.cp > 1 else 1)
        twice = " * 2" if layout.cp > 1 else ""
        _multiple("sequence_length", workload.sequence_length, ways, f"tp {layout.tp} * cp {layout.cp}{twice}")


def _multiple(name: str, value: int, of: int, product: str) -> None:
    if value % of:
        raise ConfigError(
            f"workload.{name} cannot be shared out evenly",
            found=value,
            expected=f"a multiple of {product} = {of}",
            remedy=f"set workload.{name} to {nearest(value, range(of, value + of + 1, of))}",
        )
