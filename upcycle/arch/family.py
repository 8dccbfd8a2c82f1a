"""What a dense family is: a table of tensor names with symbolic shapes, and where its FFN is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from upcycle.arch.head import CAUSAL
from upcycle.errors import SourceError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from upcycle.arch.backbone import Backbone
    from upcycle.arch.head import Head

Role = Literal["gate", "up", "down"]
Mixer = Literal["attention", "mamba2"]
Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows `start` to `stop` (symbolic sizes) of a tensor that holds several matrices one above the other."""

    tensor: str
    start: str = "0"
    stop: str


@dataclass(frozen=True, kw_only=True)
class Ffn:
    """Where the three matrices of a layer's FFN are.

    Attributes:
        module: the FFN's module inside the layer.
        gate: module of the gate matrix, None for an un-gated FFN.
        up: module of the up matrix; the same as `gate` where both are fused, gate rows first.
        down: module of the down matrix.
        bias: config flag that says whether the matrices have biases; True and False are constants.
        transposed: matrices are stored [in, out] (GPT-2's Conv1D).
        dropout: config field of a dropout inside the FFN, None where there is none.
    """

    module: str = "mlp"
    gate: str | None = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    bias: str | bool = False
    transposed: bool = False
    dropout: str | None = None

    @property
    def fused(self) -> bool:
        return self.gate == self.up

    @property
    def roles(self) -> tuple[Role, ...]:
        return ("gate", "up", "down") if self.gate else ("up", "down")


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of layers.

    Attributes:
        tensors: those of one layer, without the FFN's: name inside the layer -> symbolic shape; a name with `{expert}`
            is one tensor per expert, `experts` of them.
        optional: more of them, by the config flag that turns them on.
        mixer: what mixes positions; None where nothing does.
        ffn: the FFN's matrices; None where a layer of this kind has none.
        experts: a mixture of experts stands where an FFN would; a dense model has no such layers.
    """

    tensors: Mapping[str, str]
    optional: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    mixer: Mixer | None = None
    ffn: Ffn | None = None
    experts: bool = False


@dataclass(frozen=True, kw_only=True)
class Ahead:
    """Layers behind the last one that predict further tokens (multi-token prediction); transformers does not read them.

    Attributes:
        layer: prefix of such a layer's tensors.
        depths: config field that says how many tokens ahead, one after the other; each has layers of its own.
        pattern: the kinds of the layers of one depth, by the fields of config.json.
        as_model: the fields of config.json of a model that has the layers of one depth and no others.
        fields: those that say that a model has one depth, with layers of these kinds.
        first, last: more tensors of the first and the last layer of a depth.
    """

    layer: str
    depths: str
    pattern: Callable[[Mapping[str, Any]], tuple[str, ...]]
    as_model: Callable[[Mapping[str, Any]], dict[str, Any]]
    fields: Callable[[tuple[str, ...]], dict[str, Any]]
    first: Mapping[str, str]
    last: Mapping[str, str]

    @property
    def prefix(self) -> str:
        """What the names of all these tensors begin with."""
        return self.layer.partition("{")[0]


def block(
    tensors: Mapping[str, str], *, optional: Mapping[str, Mapping[str, str]] | None = None, ffn: Ffn | None = None
) -> Mapping[str, Kind]:
    """The only kind of a family whose layers are all alike: attention, and an FFN."""
    return {"block": Kind(tensors=tensors, optional=optional or {}, mixer="attention", ffn=ffn or Ffn())}


@dataclass(frozen=True, kw_only=True)
class Family:
    """A dense architecture as data.

    Shapes are products of symbols: H hidden size, F FFN width, V vocabulary, Q all query heads, K all key heads,
    D one head, P positions, L attributes of a reward head, and those of `more_symbols`; "3*H" and sums such as
    "Q+2*K" are allowed.

    Attributes:
        model_type: transformers' name.
        layer: prefix of a layer's tensors on disk.
        outer: tensors outside the layers, without the head.
        kinds: its kinds of layers by name; those that have an FFN have the same.
        pattern: the kind of every layer, by the fields of config.json; None where there is only one kind.
        more_symbols: from the config; None where there are none.
        native_names: what a native MoE type calls parts of fused tensors.
        activation: config field that names the activation.
        backbone: describes the rest of the model from its config.
        ahead: its layers for multi-token prediction; None where it has none.
        ignored: name endings of buffers that old checkpoints carry and no model reads.
        base_prefix: what the base model's tensors lack when it was saved without its head.
        module_prefix: what stands for `base_prefix` in memory, where it is something else.
        ties_embeddings: whether config.json's tie_word_embeddings has an effect.
    """

    model_type: str
    layer: str = "model.layers.{layer}."
    outer: Mapping[str, str]
    kinds: Mapping[str, Kind]
    pattern: Callable[[Mapping[str, Any]], tuple[str, ...]] | None = None
    more_symbols: Callable[[Any], Mapping[str, int]] | None = None
    native_names: Mapping[str, Rows] = field(default_factory=dict)
    activation: str = "hidden_act"
    backbone: Callable[[Any], Backbone]
    ahead: Ahead | None = None
    ignored: tuple[str, ...] = (".rotary_emb.inv_freq",)
    base_prefix: str = "model."
    module_prefix: str | None = None
    ties_embeddings: bool = True

    @property
    def ffn(self) -> Ffn:
        """The FFN of the layers that have one."""
        return next(kind.ffn for kind in self.kinds.values() if kind.ffn)

    def symbols(self, config: Any) -> dict[str, int]:
        """The symbols that only this family has."""
        return dict(self.more_symbols(config)) if self.more_symbols else {}

    def in_memory(self, name: str) -> str:
        """What a tensor, or a prefix of some, is called in memory."""
        if self.module_prefix is None or not name.startswith(self.base_prefix):
            return name
        return self.module_prefix + name.removeprefix(self.base_prefix)

    def layer_kinds(self, fields: Mapping[str, Any], layers: int) -> tuple[str, ...]:
        """The kind of every layer of a model with these fields in config.json."""
        return self.pattern(fields) if self.pattern else (next(iter(self.kinds)),) * layers

    @property
    def embedding(self) -> str:
        """Name of the token embedding."""
        return next(name for name, symbols in self.outer.items() if symbols == "V H")


@dataclass(frozen=True, kw_only=True)
class DenseModel:
    """One dense model: its family with the numbers of its config filled in.

    Attributes:
        family: see there.
        config: its transformers configuration.
        sizes: the symbols' values.
        backbone: everything but the FFNs, in the terms of MoE types.
        pattern: the kind of every layer.
        head: what follows the last layer.
    """

    family: Family
    config: Any
    sizes: Mapping[str, int]
    backbone: Backbone
    pattern: tuple[str, ...]
    head: Head = CAUSAL

    @property
    def layers(self) -> int:
        return len(self.pattern)

    def kind(self, layer: int) -> Kind:
        return self.family.kinds[self.pattern[layer]]

    @property
    def ffn_layers(self) -> tuple[int, ...]:
        """Indices of the layers that have an FFN."""
        return tuple(layer for layer in range(self.layers) if self.kind(layer).ffn)

    @property
    def hidden_size(self) -> int:
        return self.sizes["H"]

    @property
    def ffn_width(self) -> int:
        return self.sizes["F"]

    @property
    def activation(self) -> str:
        return str(getattr(self.config, self.family.activation))

    @property
    def gated(self) -> bool:
        return self.family.ffn.gate is not None

    @property
    def ffn_bias(self) -> bool:
        return self.flag(self.family.ffn.bias)

    @property
    def tied(self) -> bool:
        return self.head.ties and self.family.ties_embeddings and bool(self.config.tie_word_embeddings)

    def flag(self, name: str | bool) -> bool:
        return name if isinstance(name, bool) else bool(getattr(self.config, name, False))

    def size(self, expression: str) -> int:
        """The value of a symbolic size, e.g. "Q+2*K"."""
        total = 0
        for term in expression.split("+"):
            product = 1
            for factor in term.split("*"):
                product *= int(factor) if factor.isdigit() else self.sizes[factor]
            total += product
        return total

    def shape(self, symbols: str) -> Shape:
        return tuple(self.size(symbol) for symbol in symbols.split())

    def ffn_tensor(self, layer: int, role: Role, kind: str = "weight") -> str:
        """Full name of the tensor that holds the matrix (or bias) of a role."""
        ffn = self.family.ffn
        return f"{self.family.layer.format(layer=layer)}{ffn.module}.{getattr(ffn, role)}.{kind}"

    def ffn_module(self) -> str:
        """Path of the FFN's module in memory with `{layer}` left open."""
        return self.family.in_memory(self.family.layer) + self.family.ffn.module

    def ffn_shapes(self) -> Iterator[tuple[str, Shape]]:
        """Names inside the layer, and shapes as stored, of the FFN's tensors."""
        ffn, hidden, width = self.family.ffn, self.hidden_size, self.ffn_width
        rows = {ffn.down: hidden, ffn.up: 2 * width if ffn.fused else width}
        if ffn.gate and not ffn.fused:
            rows[ffn.gate] = width
        for module, out in rows.items():
            inside = width if module == ffn.down else hidden
            yield f"{ffn.module}.{module}.weight", (inside, out) if ffn.transposed else (out, inside)
            if self.ffn_bias:
                yield f"{ffn.module}.{module}.bias", (out,)

    def backbone_layer_shapes(self, layer: int) -> dict[str, Shape]:
        """Names inside the layer and shapes of everything but the FFN."""
        return self._backbone_shapes(self.kind(layer))

    def layer_shapes(self, layer: int) -> dict[str, Shape]:
        """Names inside the layer and shapes of everything in it."""
        return self._kind_shapes(self.kind(layer))

    def _backbone_shapes(self, kind: Kind) -> dict[str, Shape]:
        tables = [kind.tensors, *(table for flag, table in kind.optional.items() if self.flag(flag))]
        return {
            each: self.shape(symbols)
            for table in tables
            for name, symbols in table.items()
            for each in self._expert_names(name)
        }

    def _kind_shapes(self, kind: Kind) -> dict[str, Shape]:
        return {**self._backbone_shapes(kind), **(dict(self.ffn_shapes()) if kind.ffn else {})}

    def _expert_names(self, name: str) -> Iterator[str]:
        if "{expert}" in name:
            yield from (name.format(expert=expert) for expert in range(self.sizes["experts"]))
        else:
            yield name

    def ahead_shapes(self) -> dict[str, Shape]:
        """Every tensor of the layers for multi-token prediction."""
        ahead = self.family.ahead
        depths = getattr(self.config, ahead.depths, None) or 0 if ahead else 0
        if not (ahead and depths):
            return {}
        shapes: dict[str, Shape] = {}
        kinds = ahead.pattern(self.config.to_dict())
        for layer in range(depths * len(kinds)):
            place = layer % len(kinds)
            more = {**(ahead.first if place == 0 else {}), **(ahead.last if place == len(kinds) - 1 else {})}
            inside = self._kind_shapes(self.family.kinds[kinds[place]])
            inside |= {name: self.shape(symbols) for name, symbols in more.items()}
            shapes |= {ahead.layer.format(layer=layer) + name: shape for name, shape in inside.items()}
        return shapes

    def outer_shapes(self) -> dict[str, Shape]:
        shapes = {name: self.shape(symbols) for name, symbols in self.family.outer.items()}
        if not self.tied:
            shapes[self.head.tensor] = self.shape(self.head.shape)
        return shapes

    def tensors(self) -> dict[str, Shape]:
        """Every tensor that the model has, with its shape."""
        shapes = self.outer_shapes()
        for layer in range(self.layers):
            prefix = self.family.layer.format(layer=layer)
            shapes.update({prefix + name: shape for name, shape in self.layer_shapes(layer).items()})
        return {**shapes, **self.ahead_shapes()}


def describe(family: Family, config: Any, head: Head = CAUSAL) -> DenseModel:
    """Fill a family's symbols from a transformers configuration.

    Raises:
        SourceError: the config lacks a size that the family needs, or its layers are of no kind that it has.
    """
    try:
        hidden, heads = int(config.hidden_size), int(config.num_attention_heads)
        head_size = int(getattr(config, "head_dim", None) or hidden // heads)
        inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * hidden
        sizes = {
            "H": hidden,
            "F": int(inner),
            "V": int(config.vocab_size),
            "D": head_size,
            "Q": heads * head_size,
            "K": int(getattr(config, "num_key_value_heads", None) or heads) * head_size,
            "P": int(config.max_position_embeddings),
            "L": int(config.num_labels),
            **family.symbols(config),
        }
    except (AttributeError, TypeError) as error:
        raise SourceError(
            "config.json lacks a size that the model needs", found=error, remedy="take a complete config.json"
        ) from error
    pattern = family.layer_kinds(config.to_dict(), config.num_hidden_layers)
    backbone = family.backbone(config)
    return DenseModel(family=family, config=config, sizes=sizes, backbone=backbone, pattern=pattern, head=head)
