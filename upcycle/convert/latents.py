"""Computes the projections of latent experts: drawn, or measured on text with the dense model.

Shapes: T tokens of a window, H hidden size, L latent size, F neurons of the FFN.
"""

from __future__ import annotations

import hashlib
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from upcycle.convert.threads import one_thread
from upcycle.errors import SourceError
from upcycle.init.latent import input_basis, orthonormal, output_basis
from upcycle.init.rng import generator
from upcycle.models.load import ffn_modules, load_dense
from upcycle.models.text import library_tokens, sample_tokens
from upcycle.plan.latent import Latents, basis_name, calibrates, check_tokens, latent_start

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from transformers import PreTrainedModel

    from upcycle.arch.family import DenseModel
    from upcycle.arch.moe import MoeShape
    from upcycle.models.source import DenseSource
    from upcycle.options.config import InitConfig

WINDOW = 512  # tokens of a forward pass, or as many as the model has positions
HELD_OUT = 4096  # tokens at most that errors are measured on


@dataclass(frozen=True, kw_only=True)
class Bases:
    """The projections of all layers.

    Attributes:
        bases: by name, in float32.
        latents: what the plan says of them.
    """

    bases: Mapping[str, Tensor] = field(default_factory=dict)
    latents: Latents = field(default_factory=Latents)


def latent_bases(
    source: DenseSource, moe: MoeShape, init: InitConfig, *, seed: int, tokens: int, execute: bool
) -> Bases:
    """Compute the projections that a conversion needs, if it needs any and will run.

    Args:
        source: the dense model.
        moe: the request.
        init: how projections start.
        seed: of those that are drawn.
        tokens: to measure on.
        execute: whether the plan will run.

    Raises:
        ConfigError: too few tokens to measure on.
        SourceError: the model or its tokenizer cannot be loaded, or its inputs are not finite.
    """
    hidden = source.model.hidden_size
    start, latent = latent_start(moe.latent, init, hidden), moe.latent
    if start is None or latent is None or init.name == "random":
        return Bases()
    measured = calibrates(latent, init, hidden)
    if measured:
        check_tokens(tokens, hidden)
    if not execute:
        return Bases()
    with one_thread():
        if not measured:
            return _summed({layer: _drawn(layer, hidden, latent, seed) for layer in moe.layers})
        picked = moe.shared_width if moe.shared == "part" else 0
        ids = library_tokens(source, tokens=tokens)
        calibration = Calibration(load_dense(source), source.model, moe.layers)
        fitted = calibration.fit(ids, latent=latent, picked=picked)
        made = {layer: each.bases(layer) for layer, each in fitted.items()}
        if start == "exact":
            return _summed(made)
        errors = calibration.errors(sample_tokens(source, tokens=min(HELD_OUT, tokens)), fitted)
        order = {layer: each.order for layer, each in fitted.items()} if picked else {}
        return _summed(made, order, errors)


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """The projections of one layer, in float64.

    Attributes:
        encode_LH: fc1.
        decode_HL: what the matrices that read the input are multiplied by.
        output_HL: fc2, and transposed what the down matrix is multiplied by.
        order: neurons, the shared expert's first, each part in its own order.
        picked: how many of them are the shared expert's.
    """

    encode_LH: Tensor
    decode_HL: Tensor
    output_HL: Tensor
    order: tuple[int, ...]
    picked: int

    def bases(self, layer: int) -> dict[str, Tensor]:
        named = {"encode": self.encode_LH, "decode": self.decode_HL, "output": self.output_HL}
        return {basis_name(layer, name): basis.float().contiguous() for name, basis in named.items()}


class Calibration:
    """Runs the dense model over windows of text; holds a few matrices [H, H] for every layer, and no activations.

    Args:
        model: the dense model, in evaluation mode.
        shape: the same as names and sizes.
        layers: indices of those to measure.

    Attributes:
        ffns: the FFN of each of these layers.
    """

    def __init__(self, model: PreTrainedModel, shape: DenseModel, layers: Sequence[int]) -> None:
        self._model, self._shape = model, shape
        modules = ffn_modules(model, shape.ffn_module(), layers)
        self.ffns = {layer: Ffn(module, shape) for layer, module in modules.items()}

    def fit(self, ids: Tensor, *, latent: int, picked: int) -> dict[int, Fitted]:
        """Measure inputs and neurons, then the outputs of what is left when the strongest `picked` are taken out.

        Args:
            ids: token ids [tokens].
            latent: L.
            picked: neurons of the shared expert.

        Raises:
            SourceError: inputs that are not finite.
        """
        moments = {layer: Moments(ffn) for layer, ffn in self.ffns.items()}
        self.watch(ids, moments)
        strange = [layer for layer, each in moments.items() if not bool(each.inputs_HH.isfinite().all())]
        if strange:
            raise SourceError(
                "the FFN's inputs cannot be measured for latent projections",
                found=f"values that are not finite in layer {', '.join(map(str, strange[:5]))}",
                expected="finite ones",
                remedy="set init.latent=exact and init.scaling=exact, which measure nothing",
            )
        written = {layer: Written(self.ffns[layer], each.order(picked), picked) for layer, each in moments.items()}
        self.watch(ids, written)
        return {layer: each.projections(moments[layer], latent) for layer, each in written.items()}

    def errors(self, ids: Tensor, fitted: Mapping[int, Fitted]) -> dict[int, float]:
        """Relative root mean square error of every FFN's output between the projections, each layer on its own."""
        errors = {layer: Error(self.ffns[layer], each) for layer, each in fitted.items()}
        self.watch(ids, errors)
        return {layer: each.relative for layer, each in errors.items()}

    def watch(self, ids: Tensor, observers: Mapping[int, Observer]) -> None:
        """Run the model over all windows, and show the observer of each layer its FFN."""
        window = min(WINDOW, self._shape.sizes["P"])
        with torch.inference_mode(), ExitStack() as hooks:
            for layer, observer in observers.items():
                hooks.enter_context(self.ffns[layer].watched(observer))
            for part in ids.split(window):
                self._model.base_model(input_ids=part[None], use_cache=False)


class Observer(Protocol):
    """What is shown the FFN of a layer, window by window."""

    def see(self, x_TH: Tensor, h_TF: Tensor, y_TH: Tensor) -> None:
        """Take note of inputs, of what the neurons answer, and of outputs."""


class Moments:
    """Sums over tokens, in float64: of x x^T, [H, H], and of the squares of the neurons, [F]."""

    def __init__(self, ffn: Ffn) -> None:
        self._ffn = ffn
        hidden, neurons = ffn.down_HF.shape
        self.inputs_HH = torch.zeros(hidden, hidden, dtype=torch.float64)
        self.neurons_F = torch.zeros(neurons, dtype=torch.float64)

    def see(self, x_TH: Tensor, h_TF: Tensor, y_TH: Tensor) -> None:
        self.inputs_HH += (x_TH.T @ x_TH).double()
        self.neurons_F += h_TF.double().square().sum(0)

    @property
    def energy_F(self) -> Tensor:
        """Of what each neuron writes."""
        return self.neurons_F * self._ffn.down_HF.double().square().sum(0)

    def order(self, picked: int) -> tuple[int, ...]:
        return strongest_first(self.energy_F, picked)


class Written:
    """The sum of y y^T [H, H], in float64, of what the neurons of routed experts write.

    Args:
        ffn: the FFN.
        order: its neurons, the shared expert's first.
        picked: how many of them are the shared expert's.
    """

    def __init__(self, ffn: Ffn, order: tuple[int, ...], picked: int) -> None:
        self._ffn, self._order, self._picked = ffn, order, picked
        self.outputs_HH = torch.zeros(2 * (len(ffn.down_HF),), dtype=torch.float64)

    def see(self, x_TH: Tensor, h_TF: Tensor, y_TH: Tensor) -> None:
        routed_TH = self._ffn.written(h_TF, self._order[self._picked :])
        self.outputs_HH += (routed_TH.T @ routed_TH).double()

    def projections(self, moments: Moments, latent: int) -> Fitted:
        """Those through L dimensions; a row that reads the input counts by what its neuron writes."""
        routed = self._order[self._picked :]
        strength = moments.energy_F[list(routed)].sqrt()
        encode_LH, decode_HL = input_basis(self._ffn.reading(routed, strength), moments.inputs_HH, latent)
        output_HL = output_basis(self.outputs_HH, latent)
        return Fitted(
            encode_LH=encode_LH, decode_HL=decode_HL, output_HL=output_HL, order=self._order, picked=self._picked
        )


class Error:
    """Sums of squares: of what is wrong between the projections, and of the whole output."""

    def __init__(self, ffn: Ffn, fitted: Fitted) -> None:
        self._ffn, self._routed = ffn, fitted.order[fitted.picked :]
        self._bases = [basis.float() for basis in (fitted.encode_LH, fitted.decode_HL, fitted.output_HL)]
        self._wrong = self._whole = 0.0

    def see(self, x_TH: Tensor, h_TF: Tensor, y_TH: Tensor) -> None:
        encode_LH, decode_HL, output_HL = self._bases
        seen_TF = self._ffn.neurons(x_TH @ encode_LH.T @ decode_HL.T)
        made_TH = self._ffn.written(seen_TF, self._routed) @ output_HL @ output_HL.T
        self._wrong += float((made_TH - self._ffn.written(h_TF, self._routed)).double().square().sum())
        self._whole += float(y_TH.double().square().sum())

    @property
    def relative(self) -> float:
        return (self._wrong / self._whole) ** 0.5 if self._whole else 0.0


class Ffn:
    """The FFN of one layer as it is in memory, whatever its family calls its matrices.

    Args:
        module: from [..., H] to [..., H].
        shape: the dense model.

    Attributes:
        down_HF: the last matrix.
    """

    def __init__(self, module: nn.Module, shape: DenseModel) -> None:
        self._module, self._shape = module, shape
        self._down = module.get_submodule(shape.family.ffn.down)
        self._busy = False
        self.down_HF = self._weight(shape.family.ffn.down)

    def neurons(self, x_TH: Tensor) -> Tensor:
        """What the neurons [T, F] answer to inputs."""
        seen: list[Tensor] = []
        handle = self._down.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
        try:
            self._module(x_TH[None])
        finally:
            handle.remove()
        return seen[0][0]

    def written(self, h_TF: Tensor, neurons: tuple[int, ...]) -> Tensor:
        """What some neurons write [T, H]; with the bias, if they are all: else it is the shared expert's."""
        if len(neurons) == h_TF.shape[-1]:
            return self._down(h_TF)  # type: ignore[no-any-return]
        chosen = torch.tensor(neurons)
        return h_TF[:, chosen] @ self.down_HF[:, chosen].T

    def reading(self, neurons: tuple[int, ...], strength: Tensor) -> Tensor:
        """The rows of some neurons in the matrices that read the input, times their strength, [R, H] in float64."""
        ffn, count = self._shape.family.ffn, self._shape.ffn_width
        names = dict.fromkeys(name for name in (ffn.gate, ffn.up) if name)
        whole = torch.cat([self._weight(name) for name in names])
        rows = torch.tensor(neurons)
        return torch.cat([strength[:, None] * whole[first + rows].double() for first in range(0, len(whole), count)])

    def _weight(self, name: str) -> Tensor:
        weight = self._module.get_parameter(f"{name}.weight").detach()
        return weight.T if self._shape.family.ffn.transposed else weight

    @contextmanager
    def watched(self, observer: Observer) -> Iterator[None]:
        """Show input, neurons and output of every call that the model makes, and not those that the observer makes."""
        seen: list[Tensor] = []

        def keep(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if not self._busy:
                seen.append(args[0].flatten(0, -2))

        def show(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if not self._busy:
                h_TF, self._busy = seen.pop(), True
                try:
                    observer.see(args[0].flatten(0, -2), h_TF, output.flatten(0, -2))
                finally:
                    self._busy = False

        handles = [self._down.register_forward_pre_hook(keep), self._module.register_forward_hook(show)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def strongest_first(energy_F: Tensor, picked: int) -> tuple[int, ...]:
    """All neurons, first the `picked` of most energy; both parts by their index."""
    strongest = energy_F.argsort(descending=True, stable=True)[:picked]
    first = torch.zeros(len(energy_F), dtype=torch.bool)
    first[strongest] = True
    return (*first.nonzero().flatten().tolist(), *(~first).nonzero().flatten().tolist())


def _drawn(layer: int, hidden: int, latent: int, seed: int) -> dict[str, Tensor]:
    """Projections on random directions."""
    inputs, outputs = (
        orthonormal(hidden, latent, generator(seed, f"layer.{layer}.latent.{side}")) for side in ("input", "output")
    )
    order = tuple[int, ...]()
    return Fitted(encode_LH=inputs.T, decode_HL=inputs, output_HL=outputs, order=order, picked=0).bases(layer)


def _summed(
    made: Mapping[int, Mapping[str, Tensor]],
    neurons: Mapping[int, tuple[int, ...]] | None = None,
    errors: Mapping[int, float] | None = None,
) -> Bases:
    bases = {name: basis for each in made.values() for name, basis in each.items()}
    sums = {name: hashlib.sha256(basis.numpy().tobytes()).hexdigest() for name, basis in bases.items()}
    return Bases(bases=bases, latents=Latents(sha256=sums, neurons=neurons or {}, errors=errors or {}))
