"""The sizes of a MoE that planning needs, and the weights that follow from them. Knows no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from upcycle.arch.backbone import head_size
from upcycle.arch.families import FAMILIES
from upcycle.arch.head import CAUSAL
from upcycle.arch.mixing import mixers, scan_flops
from upcycle.arch.targets import TARGETS
from upcycle.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from upcycle.arch.backbone import QkNorm
    from upcycle.convert.prepare import Conversion
    from upcycle.models.moe import MoeDescription

WeightKind = Literal["dense", "shared", "expert"]
# What layers consist of, each with a norm before it: a layer of most models is attention and one FFN.
Part = Literal["attention", "mamba2", "dense", "moe"]


@dataclass(frozen=True, kw_only=True)
class Mamba:
    """Sizes of a Mamba-2 part (arXiv 2405.21060).

    Attributes:
        channels, heads, states: of the scan.
        groups: of heads, which share what the states read and write.
        convolved: channels of the convolution.
        kernel: its width.
    """

    channels: int
    heads: int
    states: int
    groups: int
    convolved: int
    kernel: int

    @property
    def rows(self) -> int:
        """Rows of the projection into it: gate, what is convolved, and time steps."""
        return self.channels + self.convolved + self.heads

    def scan_flops(self) -> int:
        """Forward FLOPs per token of convolution and scan."""
        return scan_flops(channels=self.channels, states=self.states, convolved=self.convolved, kernel=self.kernel)


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """A MoE as far as memory, communication and time depend on it.

    Biases other than those of queries, keys and values, learned positions and a shared expert's gate are left out.

    Attributes:
        layers: layers, of which `moe_layers` have experts, spread evenly.
        separate: how many layers are attention, and how many Mamba-2, where each part is a layer of its own; None
            where every layer is attention and an FFN.
        mamba: sizes of Mamba-2.
        hidden: hidden size.
        heads, kv_heads, head_size: of attention.
        ffn_width: of layers without experts.
        experts, top_k, expert_width: routed experts, how many of them a token uses, and their width.
        shared_width: width of the shared experts together.
        latent: what routed experts take and return, where that is not of the hidden size.
        router_bias: routers have a bias for choosing experts.
        gated: FFNs have a gate matrix.
        vocab: rows of the embedding; `tied` shares them with the head.
        norms: norms around a part that have weights.
        qkv_bias: biases of queries, keys and values.
        qk_norm: norms of queries and keys: none, per head, or over all heads together.
    """

    layers: int
    moe_layers: int
    separate: tuple[int, int] | None = None
    mamba: Mamba | None = None
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    ffn_width: int
    experts: int
    top_k: int
    expert_width: int
    shared_width: int = 0
    latent: int | None = None
    router_bias: bool = False
    gated: bool = True
    vocab: int
    tied: bool = False
    norms: int = 1
    qkv_bias: bool = False
    qk_norm: QkNorm = "none"

    @property
    def matrices(self) -> int:
        """Matrices of an FFN."""
        return 3 if self.gated else 2

    @property
    def expert_size(self) -> int:
        """What a routed expert takes and returns."""
        return self.latent or self.hidden

    def count(self, part: Part) -> int:
        """How many layers have a part."""
        attention, mamba = self.separate or (self.layers, 0)
        others = attention + mamba if self.separate else 0
        counts = {"attention": attention, "mamba2": mamba, "moe": self.moe_layers}
        return counts.get(part, self.layers - others - self.moe_layers)

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts that its layers have."""
        return tuple(part for part in get_args(Part) if self.count(part))

    def parameters(self) -> int:
        """All parameters."""
        return sum(self.count(part) * elements(weights(self, part)) for part in self.parts) + elements(outside(self))

    def forward_flops(self, *, sequence_length: int) -> int:
        """Forward FLOPs per token, as `upcycle train` counts them: 2 per weight in use, and the square of attention."""
        ffn = 2 * self.matrices
        moe = ffn * (self.top_k * self.expert_width * self.expert_size + self.shared_width * self.hidden)
        moe += 2 * self.experts * self.hidden + (4 * self.hidden * self.latent if self.latent else 0)
        per_part = {
            "attention": self.attention_flops(sequence_length=sequence_length),
            "mamba2": self._mamba_flops(scan=sequence_length > 0),
            "dense": ffn * self.hidden * self.ffn_width,
            "moe": moe,
        }
        return sum(self.count(part) * per_part[part] for part in self.parts) + 2 * self.vocab * self.hidden

    def _mamba_flops(self, *, scan: bool) -> int:
        if self.mamba is None:
            return 0
        projections = 2 * self.hidden * (self.mamba.rows + self.mamba.channels)
        return projections + (self.mamba.scan_flops() if scan else 0)

    def attention_flops(self, *, sequence_length: int) -> int:
        """Forward FLOPs per token of one layer's attention: its projections and the whole square of scores."""
        projections = self.hidden * self.head_size * 2 * (self.heads + self.kv_heads)
        return 2 * projections + 4 * sequence_length * self.heads * self.head_size


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One tensor of a layer.

    Attributes:
        shape: as transformers holds it; of experts, all of a layer's together.
        split: the dimension that tensor parallelism splits; None if every rank has the whole.
        kind: who shards it: dense and shared parts by TP, experts by EP and ETP.
    """

    shape: tuple[int, ...]
    split: int | None = None
    kind: WeightKind = "dense"


def elements(weights: Iterator[Weight]) -> int:
    return sum(math.prod(weight.shape) for weight in weights)


def weights(sizes: ModelSizes, part: Part) -> Iterator[Weight]:
    """The weights of one part, its norms included."""
    for _ in range(sizes.norms):
        yield Weight(shape=(sizes.hidden,))
    if part == "attention":
        yield from _attention(sizes)
    elif part == "mamba2":
        yield from _mamba(sizes.hidden, sizes.mamba)
    elif part == "dense":
        yield from _ffn(sizes, sizes.ffn_width, "dense")
    else:
        yield from _mixture(sizes)


def layer(sizes: ModelSizes) -> Iterator[Weight]:
    """The weights of a whole layer that has experts."""
    yield from weights(sizes, "moe")
    if not sizes.separate:
        yield from weights(sizes, "attention")


def _attention(sizes: ModelSizes) -> Iterator[Weight]:
    hidden, queries, keys = sizes.hidden, sizes.heads * sizes.head_size, sizes.kv_heads * sizes.head_size
    for rows in (queries, keys, keys):
        yield Weight(shape=(rows, hidden), split=0)
        if sizes.qkv_bias:
            yield Weight(shape=(rows,), split=0)
    yield Weight(shape=(hidden, queries), split=1)
    widths = {"none": (), "head": (sizes.head_size, sizes.head_size), "full": (queries, keys)}
    for width in widths[sizes.qk_norm]:
        yield Weight(shape=(width,))


def _mamba(hidden: int, mamba: Mamba | None) -> Iterator[Weight]:
    assert mamba
    yield Weight(shape=(mamba.rows, hidden), split=0)
    yield Weight(shape=(mamba.convolved, mamba.kernel), split=0)
    yield Weight(shape=(mamba.convolved,), split=0)
    for _ in range(3):  # time steps, decay, and what goes past the scan
        yield Weight(shape=(mamba.heads,), split=0)
    yield Weight(shape=(mamba.channels,), split=0)
    yield Weight(shape=(hidden, mamba.channels), split=1)


def _mixture(sizes: ModelSizes) -> Iterator[Weight]:
    hidden, size = sizes.hidden, sizes.expert_size
    yield Weight(shape=(sizes.experts, hidden))
    if sizes.router_bias:
        yield Weight(shape=(sizes.experts,))
    if sizes.latent:
        yield Weight(shape=(sizes.latent, hidden))
        yield Weight(shape=(hidden, sizes.latent))
    yield Weight(shape=(sizes.experts, (sizes.matrices - 1) * sizes.expert_width, size), split=1, kind="expert")
    yield Weight(shape=(sizes.experts, size, sizes.expert_width), split=2, kind="expert")
    if sizes.shared_width:
        yield from _ffn(sizes, sizes.shared_width, "shared")


def _ffn(sizes: ModelSizes, width: int, kind: WeightKind) -> Iterator[Weight]:
    for _ in range(sizes.matrices - 1):
        yield Weight(shape=(width, sizes.hidden), split=0, kind=kind)
    yield Weight(shape=(sizes.hidden, width), split=1, kind=kind)


def outside(sizes: ModelSizes) -> Iterator[Weight]:
    """The weights outside the layers: embedding, head, final norm."""
    for _ in range(1 if sizes.tied else 2):
        yield Weight(shape=(sizes.vocab, sizes.hidden), split=0)
    if sizes.norms:
        yield Weight(shape=(sizes.hidden,))


def conversion_sizes(conversion: Conversion) -> ModelSizes:
    """The sizes of what a conversion makes.

    Raises:
        ConfigError: a reward model, whose head and logits are not those that are counted.
    """
    if conversion.source.model.head is not CAUSAL:
        raise ConfigError(
            "training is planned for language models alone",
            found=f"{conversion.source.given} is a {conversion.source.model.head.name} model",
            remedy="leave parallel out, or plan the language model that it was made of",
        )
    model, moe = conversion.source.model, conversion.plan.moe
    backbone = model.backbone
    norms = 0 if backbone.norm == "layernorm_without_weights" else 2 if backbone.norm_placement == "sandwich" else 1
    least = TARGETS[conversion.plan.target].layout.shared_least or 0
    return ModelSizes(
        layers=model.layers,
        moe_layers=len(moe.layers),
        **_mixing(model.config),
        hidden=model.hidden_size,
        heads=model.sizes["Q"] // model.sizes["D"],
        kv_heads=model.sizes["K"] // model.sizes["D"],
        head_size=model.sizes["D"],
        ffn_width=model.ffn_width,
        experts=moe.experts,
        top_k=moe.top_k,
        expert_width=moe.expert_width,
        shared_width=max(moe.shared_width, least),
        latent=moe.latent,
        router_bias=TARGETS[conversion.plan.target].layout.correction_bias is not None,
        gated=model.gated,
        vocab=model.sizes["V"],
        tied=model.tied,
        norms=norms,
        qkv_bias=backbone.attention_bias != "none",
        qk_norm=backbone.qk_norm,
    )


def _mixing(config: Any) -> dict[str, Any]:
    """What mixes positions, where that is not attention in every layer."""
    found, family = mixers(config), FAMILIES.get(config.model_type)
    if family is None or None not in found:
        return {}
    symbols = family.symbols(config)
    mamba = Mamba(
        channels=symbols["I"],
        heads=symbols["S"],
        states=symbols["N"],
        groups=symbols["G"],
        convolved=symbols["C"],
        kernel=symbols["W"],
    )
    return {"separate": (found.count("attention"), found.count("mamba2")), "mamba": mamba}


def checkpoint_sizes(config: Any, moe: MoeDescription) -> ModelSizes:
    """The sizes of a checkpoint of a native MoE type, from its transformers configuration.

    Raises:
        ConfigError: it is of the generic type, whose sizes are those of a conversion.
    """
    if moe.target.generic:
        raise ConfigError(
            "training is planned for types of transformers, or for a dense model that is to be converted",
            found=f"model_type={moe.model_type}",
            remedy="give the dense model as source, and target=upcycled_moe",
        )
    heads, family = config.num_attention_heads, FAMILIES.get(config.model_type)
    return ModelSizes(
        layers=moe.layer_count,
        moe_layers=len(moe.layers),
        **_mixing(config),
        hidden=moe.hidden_size,
        heads=heads,
        kv_heads=config.num_key_value_heads,
        head_size=head_size(config),
        ffn_width=config.intermediate_size,
        experts=moe.experts,
        top_k=moe.top_k,
        expert_width=moe.expert_width,
        shared_width=moe.shared_width,
        latent=moe.latent,
        router_bias=moe.target.layout.correction_bias is not None,
        gated=moe.gated,
        vocab=moe.vocabulary,
        tied=config.tie_word_embeddings and (family is None or family.ties_embeddings),
        qkv_bias=bool(getattr(config, "qkv_bias", False)),
        qk_norm=moe.target.qk_norm,
    )
