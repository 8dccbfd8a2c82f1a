"""The frozen plan, and how it is built."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from upcycle.arch.target import Matrix, Target, matrices
from upcycle.plan.coverage import check_coverage
from upcycle.plan.experts import FfnParts, router_deviation, router_rows
from upcycle.plan.groups import group_notes
from upcycle.plan.parts import Part, Take, TargetTensor, Whole, Zeros
from upcycle.plan.scaling import LayerScaling, layer_scaling, lossless
from upcycle.plan.unread import unread_fields

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from upcycle.arch.family import DenseModel, Role, Rows, Shape
    from upcycle.arch.moe import MoeShape
    from upcycle.options.config import InitConfig

SIGMOID_OF_ZERO = 0.5
# Where a power law through the measured gaps (see DEFAULT_SPREAD) reaches the report's tolerance of 0.1 %.
LOSSLESS_SPREAD = 0.027


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything `convert` will do.

    Attributes:
        target: MoE type.
        why: reasons for the type, one line each.
        moe, init: the request.
        router_std: standard deviation of the router's rows.
        config: config.json to write, without dtype and versions.
        tensors: what to write, in order.
        dropped: source tensor -> why it is not taken over.
        scaling: factors of each MoE layer.
        losses: why step 0 will differ from the dense model, one line each; empty if it will not.
        notes: what else a user should know.
    """

    target: str
    why: tuple[str, ...]
    moe: MoeShape
    init: InitConfig
    router_std: float
    config: Mapping[str, Any]
    tensors: tuple[TargetTensor, ...]
    dropped: Mapping[str, str]
    scaling: Mapping[int, LayerScaling]
    losses: tuple[str, ...]
    notes: tuple[str, ...]

    def fingerprint(self) -> str:
        """SHA-256 of everything that decides the bytes, apart from the source's values and the seed."""
        tensors = [(t.name, t.shape, t.dtype, [repr(part) for part in t.parts]) for t in self.tensors]
        text = json.dumps([self.target, dict(self.config), tensors], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def build_plan(
    model: DenseModel,
    moe: MoeShape,
    init: InitConfig,
    target: Target,
    why: Sequence[str],
    *,
    dtypes: Mapping[str, str],
    masses: Mapping[int, float],
    dropped: Mapping[str, str],
) -> Plan:
    """Plan a conversion.

    Args:
        model: the dense model.
        moe: the MoE's shape.
        init: how experts and router start.
        target: a type that has no objections.
        why: the reasons for the type.
        dtypes: safetensors code of every source tensor after conversion to the output's dtype.
        masses: router weight of the selected experts together, by layer, expected or measured.
        dropped: stored tensors that the model does not need, and why.
    """
    gated, family = model.family.ffn.gate is not None, model.family.model_type
    ffn: dict[str, Any] = {"granularity": moe.granularity, "activation": model.activation, "gated": gated}
    scaling = {layer: layer_scaling(init.scaling, mass=masses[layer], **ffn) for layer in moe.layers}
    router_std = router_deviation(init, model.hidden_size)
    tensors = tuple(_tensors(model, moe, init, target, dtypes, scaling))
    if init.name == "random":
        reason = "replaced by random experts"
        dropped = {**dropped, **{name: reason for layer in moe.layers for name, _ in _ffn_tensors(model, layer)}}
    exact_scale = all(lossless(init.scaling, mass=masses[layer], **ffn) for layer in moe.layers)
    config = {"model_type": target.model_type, **target.fields(model, moe)}
    lost, stray = ({}, {}) if target.generic else unread_fields(model.config, config)
    plan = Plan(
        target=target.model_type,
        why=tuple(why),
        moe=moe,
        init=init,
        router_std=router_std,
        config=config,
        tensors=tensors,
        dropped=dropped,
        scaling=scaling,
        losses=(
            *_losses(moe, init, exact_scale=exact_scale, spread=router_std * model.hidden_size**0.5),
            *(f"{target.model_type} has no field for config.json's {name}={lost[name]}" for name in lost),
        ),
        notes=(
            *_notes(moe, init, target, router_std),
            *(f"config.json's {name}={stray[name]} is not taken over: {family} has no such field" for name in stray),
        ),
    )
    check_coverage(tensors, model.tensors(), dropped=dropped)
    return plan


def _tensors(
    model: DenseModel,
    moe: MoeShape,
    init: InitConfig,
    target: Target,
    dtypes: Mapping[str, str],
    scaling: Mapping[int, LayerScaling],
) -> Iterator[TargetTensor]:
    prefix = target.layout.prefix
    for name, shape in model.outer_shapes().items():
        yield _whole(prefix + name, name, shape, dtypes)
    for layer in range(model.layers):
        start = model.family.layer.format(layer=layer)
        backbone = model.backbone_layer_shapes()
        if layer not in scaling:
            backbone |= dict(model.ffn_shapes())
        split = {} if target.generic else {n: r for n, r in model.family.native_names.items() if r.tensor in backbone}
        for name, rows in split.items():
            yield _rows(prefix + start + name, start + rows.tensor, rows, model, dtypes)
        fused = {rows.tensor for rows in split.values()}
        for name, shape in backbone.items():
            if name not in fused:
                yield _whole(prefix + start + name, start + name, shape, dtypes)
        if layer in scaling:
            shared_gate = SIGMOID_OF_ZERO if target.layout.shared_gate else 1.0
            parts = FfnParts(
                model=model,
                moe=moe,
                init=init,
                layer=layer,
                scaling=scaling[layer],
                shared_gate=shared_gate,
            )
            dtype = _common_dtype({dtypes[name] for name, _ in _ffn_tensors(model, layer)})
            yield from _moe_layer(parts, target, prefix + start, dtype)


def _common_dtype(codes: set[str]) -> str:
    """The narrowest type that holds the values of all these exactly."""
    return next(iter(codes)) if len(codes) == 1 else "F64" if "F64" in codes else "F32"


def _moe_layer(parts: FfnParts, target: Target, start: str, dtype: str) -> Iterator[TargetTensor]:
    layout, model, moe = target.layout, parts.model, parts.moe
    gated, hidden = model.family.ffn.gate is not None, model.hidden_size

    def tensor(name: str, shape: Shape, made_of: Iterator[Part] | Sequence[Part], kind: str) -> TargetTensor:
        return TargetTensor(name=start + name, shape=shape, dtype=dtype, parts=tuple(made_of), kind=kind)

    yield tensor(layout.router, (moe.experts, hidden), [router_rows(model, moe, parts.init, parts.layer)], "router")
    for matrix in matrices(layout.experts, gated=gated):
        name, shape = layout.experts[matrix], _matrix_shape(matrix, hidden, parts.width)
        if "{expert}" in name:
            for expert in range(moe.experts):
                yield tensor(name.format(expert=expert), shape, _routed(parts, matrix, expert), "expert")
        else:
            stacked = (part for expert in range(moe.experts) for part in _routed(parts, matrix, expert))
            yield tensor(name, (moe.experts, *shape), stacked, "expert")
            if model.ffn_bias:
                yield tensor(f"{name}_bias", (moe.experts, shape[0]), _stacked_bias(parts, matrix), "expert")
    yield from _shared_expert(parts, layout.shared, layout.shared_always, gated, tensor)
    if layout.shared_gate:
        yield tensor(layout.shared_gate, (1, hidden), [Zeros(numel=hidden)], "shared_gate")


def _shared_expert(
    parts: FfnParts, names: Mapping[Matrix, str], always: bool, gated: bool, tensor: Any
) -> Iterator[TargetTensor]:
    count, model = parts.moe.shared_experts, parts.model
    if not count and not always:
        return
    for matrix in matrices(names, gated=gated):
        shape = _matrix_shape(matrix, model.hidden_size, parts.width * count)
        roles: tuple[Role, ...] = ("gate", "up") if matrix == "gate_up" else (matrix,)
        made_of = [part for role in roles for part in parts.shared(role)] if count else []
        yield tensor(names[matrix], shape, made_of, "shared")
        if model.ffn_bias:
            name = names[matrix].removesuffix("weight") + "bias"
            yield tensor(name, shape[:1], parts.shared_bias(roles[0]), "shared")


def _routed(parts: FfnParts, matrix: Matrix, expert: int) -> list[Part]:
    if matrix == "gate_up":
        return [parts.expert(expert, "gate"), parts.expert(expert, "up")]
    return [parts.expert(expert, matrix)]


def _stacked_bias(parts: FfnParts, matrix: Matrix) -> Iterator[Part]:
    if matrix == "gate_up":
        for gate, up in zip(parts.expert_bias("gate"), parts.expert_bias("up"), strict=True):
            yield from (gate, up)
    else:
        yield from parts.expert_bias(matrix)


def _matrix_shape(matrix: Matrix, hidden: int, width: int) -> Shape:
    if matrix == "down":
        return (hidden, width)
    return (2 * width if matrix == "gate_up" else width, hidden)


def _ffn_tensors(model: DenseModel, layer: int) -> Iterator[tuple[str, Shape]]:
    start = model.family.layer.format(layer=layer)
    return ((start + name, shape) for name, shape in model.ffn_shapes())


def _whole(name: str, source: str, shape: Shape, dtypes: Mapping[str, str]) -> TargetTensor:
    return TargetTensor(name=name, shape=shape, dtype=dtypes[source], parts=(Whole(source=source),), kind="backbone")


def _rows(name: str, source: str, rows: Rows, model: DenseModel, dtypes: Mapping[str, str]) -> TargetTensor:
    start, stop, hidden = model.size(rows.start), model.size(rows.stop), model.hidden_size
    take = Take(source=source, rows=(start, stop), cols=(0, hidden))
    return TargetTensor(name=name, shape=(stop - start, hidden), dtype=dtypes[source], parts=(take,), kind="backbone")


def _losses(moe: MoeShape, init: InitConfig, *, exact_scale: bool, spread: float) -> Iterator[str]:
    if moe.router_order == "softmax_topk" and moe.top_k < moe.experts and spread > LOSSLESS_SPREAD:
        yield f"init.router_std={init.router_std:g} is large: the weight of the selected experts varies between tokens"
    if not exact_scale and init.name != "random":
        yield f"init.scaling={init.scaling} does not undo the router's weights exactly for this activation"
    if init.name == "random":
        yield "init=random: nothing of the dense FFNs is kept"
    if init.name == "copy" and moe.granularity > 1 and moe.groups != "positions":
        yield "init=copy with granularity > 1: experts are chosen one by one, so those selected are not a whole FFN"
    if init.name == "drop" and init.ratio:
        yield f"init=drop: {init.ratio:g} of each expert's neurons start anew"
    if init.name == "noise" and init.std and init.fraction:
        yield f"init=noise: N(0, {init.std:g} std) on {init.fraction:g} of each expert's weights"


def _notes(moe: MoeShape, init: InitConfig, target: Target, router_std: float) -> Iterator[str]:
    if moe.router_order == "softmax_topk" and init.scaling in ("exact", "down", "calibrated"):
        yield f"what remains comes from the router's spread (init.router_std={router_std:g})"
    if init.scaling == "calibrated":
        yield "convert measures the factors layer by layer; plan shows the expected ones"
    if not target.generic:
        logits = f"{target.model_type} computes router logits in the model's dtype"
        yield f"{logits}: in bfloat16 about 0.5% of tokens split a group"
    yield from group_notes(moe)


def plan_dict(plan: Plan) -> dict[str, Any]:
    """The plan as plain data, for JSON."""
    return {
        "target": plan.target,
        "why": list(plan.why),
        "moe": {"name": plan.moe.name, "experts": plan.moe.experts, **asdict(plan.moe)},
        "init": {**asdict(plan.init), "router_std": plan.router_std},
        "lossless": not plan.losses,
        "losses": list(plan.losses),
        "notes": list(plan.notes),
        "scaling": {str(layer): asdict(factors) for layer, factors in plan.scaling.items()},
        "dropped": dict(plan.dropped),
        "config": dict(plan.config),
        "tensors": {
            tensor.name: {"dtype": tensor.dtype, "shape": list(tensor.shape), "from": tensor.provenance}
            for tensor in plan.tensors
        },
    }
