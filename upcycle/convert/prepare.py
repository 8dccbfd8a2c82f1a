"""From options to a checked plan with its costs: what `plan` prints and `convert` executes."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

from upcycle.checkpoint import Shard, TensorSpec, dtype_bytes, layout_shards
from upcycle.convert.calibrate import measured_masses
from upcycle.convert.latents import latent_bases
from upcycle.errors import ConfigError, OutputError
from upcycle.models.source import FLOATING, DenseSource, expanded, open_source
from upcycle.plan.ahead import MADE, ahead_family
from upcycle.plan.cost import Cost, cost
from upcycle.plan.effort import Effort, effort
from upcycle.plan.groups import settled
from upcycle.plan.plan import Plan, build_plan
from upcycle.plan.request import check_ahead, check_init, moe_shape
from upcycle.plan.scaling import expected_mass
from upcycle.plan.select import own_order, select_target

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from upcycle.options.config import ConversionConfig
    from upcycle.plan.tensors import TargetTensor

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """A conversion that is ready to run.

    Attributes:
        source: the dense model.
        plan: every tensor to write.
        cost: what it costs, however it runs.
        effort: what running it takes.
        shards: the files to write.
        free: bytes free where the output goes.
        bases: computed matrices that parts name; empty where none is, and where the plan does not run.
    """

    source: DenseSource
    plan: Plan
    cost: Cost
    effort: Effort
    shards: tuple[Shard, ...]
    free: int
    bases: Mapping[str, Tensor]

    def target_tensors(self) -> Mapping[str, TargetTensor]:
        return {tensor.name: tensor for tensor in self.plan.tensors}


def prepare(config: ConversionConfig, *, execute: bool) -> Conversion:
    """Check the request, read headers, plan, and count the costs.

    Args:
        config: the options.
        execute: whether the plan will run: weights must be there, and calibration measures.

    Raises:
        UpcycleError: anything wrong with the source or the request.
    """
    check_init(config.init)
    check_ahead(config.mtp)
    if config.calibration_tokens < 2:
        raise ConfigError("calibration_tokens is out of range", found=config.calibration_tokens, expected="2 or more")
    if config.workers < 1:
        raise ConfigError("workers is out of range", found=config.workers, expected="1 or more")
    max_shard_bytes = parse_size("max_shard_size", config.max_shard_size)
    source = open_source(config.source, need_weights=execute)
    if config.output:
        check_apart(source.path, expanded(config.output))
    if config.mtp != "keep":
        source = source.without_ahead(f"mtp={config.mtp}")
    model = source.model
    block = config.mtp if config.mtp in MADE else None
    if block:
        ahead_family(model.family.model_type, "mtp")
    order = own_order(model.family.model_type)
    moe = moe_shape(
        config.moe,
        config.init,
        ffn_width=model.ffn_width,
        hidden_size=model.hidden_size,
        layers=model.ffn_layers,
        order=order,
    )
    target, why = select_target(config.target, model, moe, portable=config.portable, ahead=block is not None)
    moe = settled(moe, config.init, target)
    dtypes = source.dtypes(config.dtype)
    masses: Mapping[int, float] = dict.fromkeys(moe.layers, expected_mass(moe))
    measuring = {"seed": config.seed, "tokens": config.calibration_tokens}
    computed = latent_bases(source, moe, config.init, **measuring, execute=execute)
    if config.init.scaling == "calibrated" and moe.router_order == "softmax_topk" and execute:
        masses = measured_masses(source, moe, config.init, **measuring)
    plan = build_plan(
        model,
        moe,
        config.init,
        target,
        why,
        dtypes=dtypes,
        masses=masses,
        dropped=source.dropped,
        portable=config.portable,
        latents=computed.latents,
        block=block,
    )
    specs = [TensorSpec(name=t.name, dtype=t.dtype, shape=t.shape) for t in plan.tensors]
    shards = layout_shards(specs, max_shard_bytes)
    counted = cost(plan, model, bytes_per_element={code: dtype_bytes(code) for code in FLOATING})
    return Conversion(
        source=source,
        plan=plan,
        cost=counted,
        effort=effort(counted, workers=config.workers, files=len(shards)),
        shards=shards,
        free=free_bytes(expanded(config.output or ".")),
        bases=computed.bases,
    )


def parse_size(name: str, text: str) -> int:
    """Bytes of a size such as 5GB, 500MB or 2GiB.

    Raises:
        ConfigError: not a size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?B)", str(text), flags=re.IGNORECASE)
    size = int(float(match[1]) * UNITS[match[2].upper()]) if match else 0
    if not size:
        raise ConfigError(f"{name} is not a size", found=text, expected="a number and a unit, such as 5GB or 500MB")
    return size


def check_apart(source: Path, output: Path) -> None:
    """Check that neither of two paths is, or lies inside, the other.

    Raises:
        OutputError: they overlap, so that replacing the output could destroy the source.
    """
    one, other = source.resolve(), output.resolve()
    if one.is_relative_to(other) or other.is_relative_to(one):
        raise OutputError(
            "the output and the source overlap",
            found=f"output {other}, source {one}",
            expected="two directories of which neither holds the other",
            remedy="choose another output",
        )


def free_bytes(output: Path) -> int:
    """Bytes free where something will be written."""
    existing = next(parent for parent in (output.absolute(), *output.absolute().parents) if parent.exists())
    return shutil.disk_usage(existing).free
