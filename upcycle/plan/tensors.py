"""The tensors to write, and what each is made of."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from upcycle.arch.padding import ALMOST_ZERO
from upcycle.arch.target import Matrix, matrices
from upcycle.plan.experts import FfnParts, dummy_neurons, latent_projections, router_rows
from upcycle.plan.parts import Constant, Part, Take, Whole

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from upcycle.arch.family import DenseModel, Role, Rows, Shape
    from upcycle.arch.moe import MoeShape
    from upcycle.arch.padding import Padding
    from upcycle.arch.target import Target
    from upcycle.options.config import InitConfig
    from upcycle.plan.latent import Latents
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
        kind: backbone, router, router_bias, expert, latent, shared or shared_gate; ahead for multi-token prediction; of
            what engines need, zeros or copy.
        layer: index of its layer; None outside the layers.
    """

    name: str
    shape: Shape
    dtype: str
    parts: tuple[Part, ...]
    kind: str
    layer: int | None = None

    @property
    def provenance(self) -> str:
        """Where the values come from, in one line."""
        runs = [str(part) for part in self.parts]
        if len(runs) > 4:
            return f"{runs[0]} | {runs[1]} | … {len(runs) - 3} more … | {runs[-1]}"
        return " | ".join(runs) or "empty"


@dataclass(frozen=True, kw_only=True)
class Tensors:
    """Every tensor of a conversion.

    Attributes:
        model: the dense model.
        moe: the MoE's shape.
        init: how experts and router start.
        target: the MoE type.
        dtypes: safetensors code of every source tensor after conversion to the output's dtype.
        scaling: factors of each MoE layer.
        padding: of the type; None where it is left out.
        padded: fields of config.json that speak of zeros.
        latents: what was computed for latent projections.
    """

    model: DenseModel
    moe: MoeShape
    init: InitConfig
    target: Target
    dtypes: Mapping[str, str]
    scaling: Mapping[int, LayerScaling]
    padding: Padding | None
    padded: Mapping[str, Any]
    latents: Latents

    def all(self) -> Iterator[TargetTensor]:
        """Yield them in the order in which they are written."""
        for name, shape in self.model.outer_shapes().items():
            yield self._whole(name, shape)
        for layer in range(self.model.layers):
            yield from (replace(tensor, layer=layer) for tensor in self._layer(layer))
        for name, shape in self.model.ahead_shapes().items():
            yield replace(self._whole(name, shape), kind="ahead")
        if self.padding and self.model.tied:
            copied = self.padding.embedding
            whole = self._whole(copied, self.model.outer_shapes()[copied])
            yield replace(whole, name=self.padding.head, kind="copy")

    def _layer(self, layer: int) -> Iterator[TargetTensor]:
        model, moe = self.model, layer in self.scaling
        start = model.family.layer.format(layer=layer)
        backbone = model.backbone_layer_shapes(layer) if moe else model.layer_shapes(layer)
        names = {} if self.target.generic else model.family.native_names
        split = {name: rows for name, rows in names.items() if rows.tensor in backbone}
        for name, rows in split.items():
            yield self._rows(start + name, start + rows.tensor, rows)
        fused = {rows.tensor for rows in split.values()}
        for name, shape in backbone.items():
            if name not in fused:
                yield self._whole(start + name, shape)
        if moe:
            yield from self._mixture(layer)
        if self.padding and self.padding.bias_field in self.padded:
            for name, size in self.padding.biases.items():
                yield self._zeros(layer, name, model.shape(size))

    def _mixture(self, layer: int) -> Iterator[TargetTensor]:
        layout, model, moe = self.target.layout, self.model, self.moe
        hidden, router = model.hidden_size, router_rows(model, moe, self.init, layer)
        shared_gate = SIGMOID_OF_ZERO if layout.shared_gate else 1.0
        parts = FfnParts(
            model=model,
            moe=moe,
            init=self.init,
            layer=layer,
            scaling=self.scaling[layer],
            shared_gate=shared_gate,
            order=self.latents.neurons.get(layer),
        )
        yield self._made(layer, layout.router, (moe.experts, hidden), [router], "router")
        if layout.correction_bias:
            bias = self._made(layer, layout.correction_bias, (moe.experts,), [Constant(numel=moe.experts)], "")
            yield replace(bias, dtype="F32", kind="router_bias")
        for matrix in matrices(layout.experts, gated=model.gated):
            name, shape = layout.experts[matrix], _matrix_shape(matrix, parts.inside, moe.expert_width)
            if "{expert}" in name:
                for expert in range(moe.experts):
                    yield self._made(layer, name, shape, _routed(parts, matrix, expert), "expert", expert=expert)
            else:
                stacked = (part for expert in range(moe.experts) for part in _routed(parts, matrix, expert))
                yield self._made(layer, name, (moe.experts, *shape), stacked, "expert")
                if model.ffn_bias:
                    biases = _stacked_bias(parts, matrix)
                    yield self._made(layer, f"{name}_bias", (moe.experts, shape[0]), biases, "expert")
        if moe.latent and layout.latent:
            fc1, fc2 = latent_projections(model, moe, self.init, layer)
            yield self._made(layer, layout.latent[0], (moe.latent, hidden), [fc1], "latent")
            yield self._made(layer, layout.latent[1], (hidden, moe.latent), [fc2], "latent")
        yield from self._shared(layer, parts)
        if layout.shared_gate:
            value = Constant(numel=hidden, value=ALMOST_ZERO if self.padding else 0.0)
            gate = self._made(layer, layout.shared_gate, (1, hidden), [value], "shared_gate")
            # float16 has no number so small.
            yield replace(gate, dtype="F32") if self.padding and gate.dtype == "F16" else gate

    def _shared(self, layer: int, parts: FfnParts) -> Iterator[TargetTensor]:
        layout, model, width = self.target.layout, self.model, self.moe.shared_width
        zeros = self.padding is not None and self.padding.width_field in self.padded
        if not (width or zeros) and layout.shared_least is None:
            return
        for matrix in matrices(layout.shared, gated=model.gated):
            name, roles = layout.shared[matrix], _roles(matrix)
            if zeros and self.padding:
                yield self._zeros(layer, name, _matrix_shape(matrix, model.hidden_size, self.padding.width))
                continue
            least = layout.shared_least or 0
            shape = _matrix_shape(matrix, model.hidden_size, max(width, least))
            if width:
                made_of = [part for role in roles for part in parts.shared(role)]
            else:
                made_of = [dummy_neurons(model, layer, matrix, least)] if least else []
            yield self._made(layer, name, shape, made_of, "shared")
            if model.ffn_bias:
                bias = name.removesuffix("weight") + "bias"
                yield self._made(layer, bias, shape[:1], parts.shared_bias(roles[0]), "shared")

    def _stored(self, name: str) -> str:
        prefix = self.target.layout.prefix
        return prefix + (self.model.family.in_memory(name) if self.target.generic else name)

    def _made(
        self, layer: int, name: str, shape: Shape, parts: Iterable[Part], kind: str, *, expert: int | None = None
    ) -> TargetTensor:
        """A tensor of a layer that replaces something of its FFN, by its name in the layout."""
        family = self.model.family
        full = self._stored(family.layer.format(layer=layer)) + name.format(expert=expert, ffn=family.ffn.module)
        return TargetTensor(name=full, shape=shape, dtype=self._ffn_dtype(layer), parts=tuple(parts), kind=kind)

    def _zeros(self, layer: int, name: str, shape: Shape) -> TargetTensor:
        return self._made(layer, name, shape, [Constant(numel=math.prod(shape))], "zeros")

    def _ffn_dtype(self, layer: int) -> str:
        """The narrowest type that holds the values of all of an FFN exactly."""
        codes = {self.dtypes[name] for name, _ in ffn_tensors(self.model, layer)}
        return next(iter(codes)) if len(codes) == 1 else "F64" if "F64" in codes else "F32"

    def _whole(self, source: str, shape: Shape) -> TargetTensor:
        dtype, parts = self.dtypes[source], (Whole(source=source),)
        return TargetTensor(name=self._stored(source), shape=shape, dtype=dtype, parts=parts, kind="backbone")

    def _rows(self, name: str, source: str, rows: Rows) -> TargetTensor:
        start, stop, hidden = self.model.size(rows.start), self.model.size(rows.stop), self.model.hidden_size
        parts = (Take(source=source, rows=(start, stop), cols=(0, hidden)),)
        dtype, shape = self.dtypes[source], (stop - start, hidden)
        return TargetTensor(name=self._stored(name), shape=shape, dtype=dtype, parts=parts, kind="backbone")


def _roles(matrix: Matrix) -> tuple[Role, ...]:
    return ("gate", "up") if matrix == "gate_up" else (matrix,)


def _routed(parts: FfnParts, matrix: Matrix, expert: int) -> list[Part]:
    return [parts.expert(expert, role) for role in _roles(matrix)]


def _stacked_bias(parts: FfnParts, matrix: Matrix) -> Iterator[Part]:
    for biases in zip(*(parts.expert_bias(role) for role in _roles(matrix)), strict=True):
        yield from biases


def _matrix_shape(matrix: Matrix, hidden: int, width: int) -> Shape:
    if matrix == "down":
        return (hidden, width)
    return (2 * width if matrix == "gate_up" else width, hidden)


def ffn_tensors(model: DenseModel, layer: int) -> Iterator[tuple[str, Shape]]:
    start = model.family.layer.format(layer=layer)
    return ((start + name, shape) for name, shape in model.ffn_shapes())
