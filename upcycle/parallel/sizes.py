"""The sizes of a MoE that planning needs, and the weights that follow from them. Knows no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Iterator

    from upcycle.arch.backbone import QkNorm
    from upcycle.convert.prepare import Conversion
    from upcycle.models.moe import MoeDescription

WeightKind = Literal["dense", "shared", "expert"]


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """A MoE as far as memory, communication and time depend on it.

    Biases other than those of queries, keys and values, learned positions and a shared expert's gate are left out.

    Attributes:
        layers: layers, of which `moe_layers` have experts, spread evenly.
        hidden: hidden size.
        heads, kv_heads, head_size: of attention.
        ffn_width: of layers without experts.
        experts, top_k, expert_width: routed experts, how many of them a token uses, and their width.
        shared_width: width of the shared experts together.
        gated: FFNs have a gate matrix.
        vocab: rows of the embedding; `tied` shares them with the head.
        norms: norms of a layer that have weights.
        qkv_bias: biases of queries, keys and values.
        qk_norm: norms of queries and keys: none, per head, or over all heads together.
    """

    layers: int
    moe_layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    ffn_width: int
    experts: int
    top_k: int
    expert_width: int
    shared_width: int = 0
    gated: bool = True
    vocab: int
    tied: bool = False
    norms: int = 2
    qkv_bias: bool = False
    qk_norm: QkNorm = "none"

    @property
    def matrices(self) -> int:
        """Matrices of an FFN."""
        return 3 if self.gated else 2

    def parameters(self) -> int:
        """All parameters."""
        dense_layers = self.layers - self.moe_layers
        inside = self.moe_layers * elements(layer(self, moe=True)) + dense_layers * elements(layer(self, moe=False))
        return inside + elements(outside(self))

    def forward_flops(self, *, sequence_length: int) -> int:
        """Forward FLOPs per token, as `upcycle train` counts them: 2 per weight in use, and the square of attention."""
        ffn = 2 * self.matrices * self.hidden
        per_layer = self.attention_flops(sequence_length=sequence_length)
        moe = ffn * (self.top_k * self.expert_width + self.shared_width) + 2 * self.experts * self.hidden
        dense = ffn * self.ffn_width
        return (
            self.layers * per_layer
            + self.moe_layers * moe
            + (self.layers - self.moe_layers) * dense
            + 2 * self.vocab * self.hidden
        )

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


def layer(sizes: ModelSizes, *, moe: bool) -> Iterator[Weight]:
    """The weights of one layer."""
    hidden, queries, keys = sizes.hidden, sizes.heads * sizes.head_size, sizes.kv_heads * sizes.head_size
    for rows in (queries, keys, keys):
        yield Weight(shape=(rows, hidden), split=0)
        if sizes.qkv_bias:
            yield Weight(shape=(rows,), split=0)
    yield Weight(shape=(hidden, queries), split=1)
    widths = {"none": (), "head": (sizes.head_size, sizes.head_size), "full": (queries, keys)}
    for width in widths[sizes.qk_norm]:
        yield Weight(shape=(width,))
    for _ in range(sizes.norms):
        yield Weight(shape=(hidden,))
    if not moe:
        yield from _ffn(sizes, sizes.ffn_width, "dense")
        return
    yield Weight(shape=(sizes.experts, hidden))
    yield Weight(shape=(sizes.experts, (sizes.matrices - 1) * sizes.expert_width, hidden), split=1, kind="expert")
    yield Weight(shape=(sizes.experts, hidden, sizes.expert_width), split=2, kind="expert")
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
    """The sizes of what a conversion makes."""
    model, moe = conversion.source.model, conversion.plan.moe
    backbone = model.backbone
    norms = 0 if backbone.norm == "layernorm_without_weights" else 4 if backbone.norm_placement == "sandwich" else 2
    return ModelSizes(
        layers=model.layers,
        moe_layers=len(moe.layers),
        hidden=model.hidden_size,
        heads=model.sizes["Q"] // model.sizes["D"],
        kv_heads=model.sizes["K"] // model.sizes["D"],
        head_size=model.sizes["D"],
        ffn_width=model.ffn_width,
        experts=moe.experts,
        top_k=moe.top_k,
        expert_width=moe.expert_width,
        shared_width=moe.shared_width,
        gated=model.gated,
        vocab=model.sizes["V"],
        tied=model.tied,
        norms=norms,
        qkv_bias=backbone.attention_bias != "none",
        qk_norm=backbone.qk_norm,
    )


def checkpoint_sizes(config: Any, moe: MoeDescription) -> ModelSizes:
    """The sizes of a checkpoint of a native MoE type, from its transformers configuration."""
    heads = config.num_attention_heads
    return ModelSizes(
        layers=moe.layer_count,
        moe_layers=len(moe.layers),
        hidden=moe.hidden_size,
        heads=heads,
        kv_heads=config.num_key_value_heads,
        head_size=getattr(config, "head_dim", None) or moe.hidden_size // heads,
        ffn_width=config.intermediate_size,
        experts=moe.experts,
        top_k=moe.top_k,
        expert_width=moe.expert_width,
        shared_width=moe.shared_width,
        vocab=moe.vocabulary,
        tied=config.tie_word_embeddings,
        qk_norm=moe.target.qk_norm,
    )
