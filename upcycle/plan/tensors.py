"""The tensors to write, and what each is made of."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from upcycle.arch.padding import ALMOST_ZERO
from upcycle.arch.target import Matrix, Target, matrices
from upcycle.plan.experts import FfnParts, router_rows
from upcycle.plan.parts import Constant, Part, Take, Whole

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from upcycle.arch.family import DenseModel, Role, Rows, Shape
    from upcycle.arch.moe import MoeShape
    from upcycle.arch.padding import Padding
    from upcycle.options.config import InitConfig
    from upcycle.plan.scaling import LayerScaling

SIGMOID_OF_ZERO = 0.5


@dataclass(frozen=True, kw_only=True)
class TargetTensor:
    """One tensor to write: the bytes of its parts one after the other, row-major.

    Attributes:
        name: name on disk.
        shape: shape on disk.
        dtype: safetensors code.
        parts: what it is made of.
        kind: backbone, router, expert, shared or shared_gate; of what engines need, zeros or copy.
    """

    name: str
    shape: Shape
    dtype: str
    parts: tuple[Part, ...]
    kind: str

    @property
    def provenance(self) -> str:
        """Where the values come from, in one line."""
        runs = [str(part) for part in self.parts]
        if len(runs) > 4:
            return f"{runs[0]} | {runs[1]} | … {len(runs) - 3} more … | {runs[-1]}"
        return " | ".join(runs) or "empty"


def target_tensors(
    model: DenseModel,
    moe: MoeShape,
    init: InitConfig,
    target: Target,
    dtypes: Mapping[str, str],
    scaling: Mapping[int, LayerScaling],
    *,
    padding: Padding | None,
    padded: Mapping[str, Any],
) -> Iterator[TargetTensor]:
    """Every tensor to write, in order.

    Args:
        model: the dense model.
        moe: the MoE's shape.
        init: how experts and router start.
        target: the MoE type.
        dtypes: safetensors code of every source tensor after conversion to the output's dtype.
        scaling: factors of each MoE layer.
        padding: of the type; None where it is left out.
        padded: fields of config.json that speak of zeros.
    """
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
            dtype = _common_dtype({dtypes[name] for name, _ in ffn_tensors(model, layer)})
            yield from _moe_layer(parts, target, prefix + start, dtype, padding=padding, padded=padded)
        if padding and padding.bias_field in padded:
            dtype = _common_dtype({dtypes[name] for name, _ in ffn_tensors(model, layer)})
            for name, size in padding.biases.items():
                yield _zeros(start + name, model.shape(size), dtype)
    if padding and model.tied:
        copy = (Whole(source=padding.embedding),)
        shape, dtype = model.outer_shapes()[padding.embedding], dtypes[padding.embedding]
        yield TargetTensor(name=padding.head, shape=shape, dtype=dtype, parts=copy, kind="copy")


def _common_dtype(codes: set[str]) -> str:
    """The narrowest type that holds the values of all these exactly."""
    return next(iter(codes)) if len(codes) == 1 else "F64" if "F64" in codes else "F32"


def _moe_layer(
    parts: FfnParts,
    target: Target,
    start: str,
    dtype: str,
    *,
    padding: Padding | None,
    padded: Mapping[str, Any],
) -> Iterator[TargetTensor]:
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
    if padding and padding.width_field in padded:
        for matrix in matrices(layout.shared, gated=gated):
            yield _zeros(start + layout.shared[matrix], _matrix_shape(matrix, hidden, padding.width), dtype)
    else:
        yield from _shared_expert(parts, layout.shared, layout.shared_always, gated, tensor)
    if layout.shared_gate:
        value = Constant(numel=hidden, value=ALMOST_ZERO if padding else 0.0)
        gate = tensor(layout.shared_gate, (1, hidden), [value], "shared_gate")
        # float16 has no number so small.
        yield replace(gate, dtype="F32") if padding and dtype == "F16" else gate


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


def _zeros(name: str, shape: Shape, dtype: str) -> TargetTensor:
    return TargetTensor(name=name, shape=shape, dtype=dtype, parts=(Constant(numel=math.prod(shape)),), kind="zeros")


def ffn_tensors(model: DenseModel, layer: int) -> Iterator[tuple[str, Shape]]:
    start = model.family.layer.format(layer=layer)
    return ((start + name, shape) for name, shape in model.ffn_shapes())


def _whole(name: str, source: str, shape: Shape, dtypes: Mapping[str, str]) -> TargetTensor:
    return TargetTensor(name=name, shape=shape, dtype=dtypes[source], parts=(Whole(source=source),), kind="backbone")


def _rows(name: str, source: str, rows: Rows, model: DenseModel, dtypes: Mapping[str, str]) -> TargetTensor:
    start, stop, hidden = model.size(rows.start), model.size(rows.stop), model.hidden_size
    take = Take(source=source, rows=(start, stop), cols=(0, hidden))
    return TargetTensor(name=name, shape=(stop - start, hidden), dtype=dtypes[source], parts=(take,), kind="backbone")
