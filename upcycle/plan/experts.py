"""Which part of the dense FFN each expert is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from upcycle.plan.groups import GROUPED_INITS
from upcycle.plan.latent import basis_name, latent_start
from upcycle.plan.parts import (
    AddNoise,
    Basis,
    Beside,
    Constant,
    DropNeurons,
    Identity,
    Normal,
    Part,
    Pick,
    Projected,
    Range,
    Side,
    Take,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from upcycle.arch.family import DenseModel, Role
    from upcycle.arch.moe import MoeShape
    from upcycle.options.config import InitConfig
    from upcycle.plan.scaling import LayerScaling


# Standard deviation of the router's logits where the norm before it gives unit RMS: SmolLM2-135M's loss rises by 0.03 %
# (0.48, a usual initialization, raises it by 6 %: analysis/results/step0.json).
DEFAULT_SPREAD = 0.012


def router_deviation(init: InitConfig, hidden_size: int) -> float:
    """Standard deviation of the router's rows: what was asked for, or one that keeps groups about equally likely."""
    return DEFAULT_SPREAD / hidden_size**0.5 if init.router_std is None else init.router_std


def router_rows(model: DenseModel, moe: MoeShape, init: InitConfig, layer: int) -> Normal:
    """The router [N, H]: one drawn row per virtual group, or one per expert where there are none."""
    return Normal(
        rows=moe.experts,
        cols=model.hidden_size,
        std=router_deviation(init, model.hidden_size),
        key=f"layer.{layer}.router",
        repeat=moe.granularity if init.name in GROUPED_INITS else 1,
    )


def dummy_neurons(model: DenseModel, layer: int, matrix: str, width: int) -> Part:
    """A matrix of a shared expert that computes 0 and learns: its down matrix is zeros, and the others are not."""
    if matrix == "down":
        return Constant(numel=model.hidden_size * width)
    std = model.hidden_size**-0.5
    return Normal(rows=width, cols=model.hidden_size, std=std, key=f"layer.{layer}.shared.{matrix}")


def latent_projections(model: DenseModel, moe: MoeShape, init: InitConfig, layer: int) -> tuple[Part, Part]:
    """fc1 [L, H] and fc2 [H, L], between which routed experts compute."""
    hidden, latent = model.hidden_size, moe.latent or model.hidden_size
    if init.name == "random":
        stem, std = f"layer.{layer}.latent", init.std
        return (
            Normal(rows=latent, cols=hidden, std=std, key=f"{stem}.fc1"),
            Normal(rows=hidden, cols=latent, std=std, key=f"{stem}.fc2"),
        )
    start = latent_start(moe.latent, init, hidden)
    if start is None:
        return Identity(rows=latent, cols=hidden), Identity(rows=hidden, cols=latent)
    fc1 = Basis(name=basis_name(layer, "encode"), rows=latent, cols=hidden)
    if start == "exact":
        return fc1, Constant(numel=hidden * latent)
    return fc1, Basis(name=basis_name(layer, "output"), rows=hidden, cols=latent)


@dataclass(frozen=True, kw_only=True)
class FfnParts:
    """The parts of one MoE layer.

    Attributes:
        model, moe, init: the dense model and the request.
        layer: index of the layer.
        scaling: the layer's factors.
        shared_gate: factor that the type applies to its shared expert at initialization (0.5 for a sigmoid of 0).
        order: all neurons of the FFN, the shared expert's first; None where they are as they are.
    """

    model: DenseModel
    moe: MoeShape
    init: InitConfig
    layer: int
    scaling: LayerScaling
    shared_gate: float
    order: tuple[int, ...] | None = None

    @property
    def width(self) -> int:
        """Neurons of one expert."""
        return self.moe.expert_width

    @property
    def first(self) -> int:
        """The first neuron that is cut into shards; those before it are the shared expert's alone."""
        return self.moe.shared_width if self.moe.shared == "part" else 0

    @property
    def inside(self) -> int:
        """The size in which routed experts compute: L, or H."""
        return self.moe.latent or self.model.hidden_size

    @property
    def projected(self) -> bool:
        """Whether routed experts are made from projections of shards."""
        return latent_start(self.moe.latent, self.init, self.model.hidden_size) is not None

    def expert(self, expert: int, role: Role) -> Part:
        """A matrix of a routed expert, [width, L] for gate and up, [L, width] for down; L is H where not asked for."""
        if role == "down" and self.moe.shared == "whole" and not self.projected:
            return Constant(numel=self.inside * self.width)
        shard = expert % self.moe.granularity
        factor = self.scaling.matrix[role] * (self._routed_share(shard) if role == "down" else 1.0)
        stem = f"layer.{self.layer}.expert.{expert}"
        base = self._project(role, self._take(role, shard, factor))
        match self.init.name:
            case "drop":
                coherent = self.init.neurons == "coherent"
                return DropNeurons(
                    base=base,
                    neuron_axis=1 if role == "down" else 0,
                    ratio=self.init.ratio,
                    neurons_key=f"{stem}.neurons" if coherent else f"{stem}.{role}.neurons",
                    values_key=f"{stem}.{role}",
                )
            case "noise":
                return AddNoise(base=base, std=self.init.std, fraction=self.init.fraction, key=f"{stem}.{role}")
            case "random":
                return self._random(role, self.inside, self.width, factor, f"{stem}.{role}")
        return base

    def expert_bias(self, role: Role) -> Iterator[Part]:
        """A bias of every routed expert in order: [width] for gate and up, [L] for down."""
        factor = self.scaling.bias[role] * (1 - self._shared_bias_share() if role == "down" else 1.0)
        for expert in range(self.moe.experts):
            if role == "down" and (self.init.name == "random" or not factor):
                yield Constant(numel=self.inside)
                continue
            bias = self._bias(role, self._neurons(expert % self.moe.granularity), factor)
            yield self._project(role, bias) if role == "down" and isinstance(bias, Take) else bias

    def shared(self, role: Role) -> Iterator[Part]:
        """A matrix of the shared expert; made of copies, it is shards 0, 1, … in turn."""
        shards = range(self.moe.shared_experts)
        factor = 1 / self.shared_gate if role == "down" else 1.0
        if self.init.name == "random":
            key = f"layer.{self.layer}.shared.{role}"
            yield self._random(role, self.model.hidden_size, self.moe.shared_width, factor, key)
        elif self.moe.shared != "copies":
            yield self._shard(role, (0, self.moe.shared_width), factor)
        elif role == "down":
            granularity = self.moe.granularity
            factors = (self._shared_share(shard % granularity) / self.shared_gate for shard in shards)
            taken = ((self._neurons(s % granularity), f) for s, f in zip(shards, factors, strict=True))
            yield Beside(parts=tuple(self._rectangle("down", neurons, f) for neurons, f in taken))
        else:
            for shard in shards:
                yield self._rectangle(role, self._neurons(shard % self.moe.granularity), 1.0)

    def shared_bias(self, role: Role) -> Iterator[Part]:
        """A bias of the shared expert."""
        if role == "down":
            yield self._bias("down", self._neurons(0), self._shared_bias_share() / self.shared_gate)
        elif self.moe.shared != "copies":
            yield self._bias(role, (0, self.moe.shared_width), 1.0)
        else:
            for shard in range(self.moe.shared_experts):
                yield self._bias(role, self._neurons(shard % self.moe.granularity), 1.0)

    def _shared_bias_share(self) -> float:
        """How much of the down bias is the shared expert's."""
        if self.moe.shared != "copies":
            return 1.0
        return self.moe.shared_experts / (self.moe.top_k + self.moe.shared_experts)

    def _copies(self, shard: int) -> tuple[int, float]:
        """How often a shard is held by the shared expert, and how many routed copies of it are active."""
        if self.moe.shared != "copies":
            return 0, self.moe.top_k / self.moe.granularity
        whole, rest = divmod(self.moe.shared_experts, self.moe.granularity)
        return whole + (shard < rest), self.moe.top_k / self.moe.granularity

    def _routed_share(self, shard: int) -> float:
        """Every active copy of a shard, routed or shared, contributes the same, so that together they are one FFN."""
        shared, routed = self._copies(shard)
        return routed / (shared + routed)

    def _shared_share(self, shard: int) -> float:
        shared, routed = self._copies(shard)
        return 1 / (shared + routed)

    def _take(self, role: Role, shard: int, factor: float) -> Take | Pick:
        return self._shard(role, self._neurons(shard), factor)

    def _project(self, role: Role, base: Take | Pick) -> Take | Pick | Projected:
        """What a routed expert has of a matrix, or of a down bias."""
        if not self.projected:
            return base
        side: Side = "output" if role == "down" else "input"
        basis = basis_name(self.layer, "output" if role == "down" else "decode")
        return Projected(base=base, basis=basis, side=side, latent=self.inside)

    def _shard(self, role: Role, neurons: Range, factor: float) -> Take | Pick:
        """A matrix of some neurons, counted in `order`."""
        if self.order is None:
            return self._rectangle(role, neurons, factor)
        whole = self._rectangle(role, (0, self.model.ffn_width), factor)
        return Pick(base=whole, neuron_axis=1 if role == "down" else 0, neurons=self.order[slice(*neurons)])

    def _rectangle(self, role: Role, neurons: Range, factor: float) -> Take:
        hidden = (0, self.model.hidden_size)
        return Take(
            source=self.model.ffn_tensor(self.layer, role),
            rows=hidden if role == "down" else self._rows(role, neurons),
            cols=neurons if role == "down" else hidden,
            transposed=self.model.family.ffn.transposed,
            factor=factor,
        )

    def _bias(self, role: Role, neurons: Range, factor: float) -> Part:
        """A bias: of some neurons, counted in `order`, or of the output."""
        source = self.model.ffn_tensor(self.layer, role, "bias")
        if role == "down":
            neurons = (0, self.model.hidden_size)
        if self.init.name == "random":
            return Constant(numel=neurons[1] - neurons[0])
        if role == "down":
            return Take(source=source, rows=neurons, factor=factor)
        if self.order is None:
            return Take(source=source, rows=self._rows(role, neurons), factor=factor)
        whole = Take(source=source, rows=self._rows(role, (0, self.model.ffn_width)), factor=factor)
        return Pick(base=whole, neuron_axis=0, neurons=self.order[slice(*neurons)])

    def _neurons(self, shard: int) -> Range:
        start = self.first + shard * self.width
        return start, start + self.width

    def _rows(self, role: Role, neurons: Range) -> Range:
        """Where neurons are in the tensor that holds a role's matrix."""
        offset = self.model.ffn_width if role == "up" and self.model.family.ffn.fused else 0
        return offset + neurons[0], offset + neurons[1]

    def _random(self, role: Role, inside: int, width: int, factor: float, key: str) -> Normal:
        rows, cols = (inside, width) if role == "down" else (width, inside)
        return Normal(rows=rows, cols=cols, std=self.init.std, factor=factor, key=key)
