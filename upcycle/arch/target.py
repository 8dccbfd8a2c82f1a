"""What a MoE type can express, how it names its tensors, and how its config.json is written."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from upcycle.arch.backbone import window_kind
from upcycle.arch.head import CAUSAL

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from upcycle.arch.backbone import AttentionBias, Norm, NormPlacement, QkNorm, Windows
    from upcycle.arch.family import DenseModel
    from upcycle.arch.moe import MoeShape, RouterOrder
    from upcycle.arch.padding import Padding

Matrix = Literal["gate", "up", "gate_up", "down"]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Names of a MoE layer's tensors on disk, inside the layer.

    Attributes:
        prefix: what precedes every tensor name of the model.
        router: the router's weight [N, H].
        correction_bias: float32 [N] that is added to scores for choosing experts; None where there is none.
        experts: matrix -> name; a name with `{expert}` is one tensor per expert, one without is stacked [N, out, in].
        shared: matrix -> name of the shared expert; empty where the type has none.
        shared_gate: weight [1, H] of the sigmoid in front of the shared expert; None where there is none.
        shared_least: width of the shared expert where none is asked for; None where there are no tensors then.
        latent: names of the projections [L, H] before and [H, L] after the routed experts; None where there are none.
    """

    prefix: str = ""
    router: str = "mlp.gate.weight"
    correction_bias: str | None = None
    experts: Mapping[Matrix, str]
    shared: Mapping[Matrix, str] = field(default_factory=dict)
    shared_gate: str | None = None
    shared_least: int | None = None
    latent: tuple[str, str] | None = None


def matrices(names: Mapping[Matrix, str], *, gated: bool) -> tuple[Matrix, ...]:
    """The matrices that a table of names stores for a gated or un-gated FFN."""
    if not gated:
        return ("up", "down")
    return ("gate_up", "down") if "gate_up" in names else ("gate", "up", "down")


PER_EXPERT: Mapping[Matrix, str] = {
    "gate": "mlp.experts.{expert}.gate_proj.weight",
    "up": "mlp.experts.{expert}.up_proj.weight",
    "down": "mlp.experts.{expert}.down_proj.weight",
}


@dataclass(frozen=True, kw_only=True)
class Objection:
    """One field of a request that a MoE type cannot express."""

    field: str
    found: str
    expressible: str

    def __str__(self) -> str:
        return f"{self.field} is {self.found}, it can express {self.expressible}"


@dataclass(frozen=True, kw_only=True)
class Target:
    """A MoE type as data; the attributes from `norm` to `dense_layers` say what it can express.

    Attributes:
        model_type: transformers' name.
        architecture: transformers' class of causal models.
        reward: whether transformers, or this project, has a class with a reward head too.
        family: the dense family whose own mixture this is: everything but its FFNs is as there.
        norm, norm_placement, qk_norm, attention_bias: as in `Backbone`.
        windows: sliding windows: none, the same on all layers, or any mixture.
        gated: whether its FFNs have a gate.
        router_orders: orders of softmax and top-k, or sigmoids.
        shared: whether it has shared experts.
        dense_layers: whether some layers may keep their FFN.
        ahead: whether layers for multi-token prediction are kept, as its own.
        generic: the type takes any backbone, un-gated FFNs and biases.
        float32_router: whether logits are float32 whatever the model's dtype.
        scale_field: field of config.json that multiplies the router's weights; None where matrices carry the scale.
        layout: the names on disk.
        blocks: modules of a layer in memory whose outputs together replace the FFN's.
        router_module: the router's module in memory, inside the layer.
        indices_first_before: the transformers since which its router returns (logits, weights, indices), as all others
            do; before it was (indices, weights, logits).
        fields: the fields of config.json that are the type's own.
        padding: what other engines must find in a checkpoint; None if nothing.
        old_names: field of config.json in older transformers -> today's.
        spelling: how config.json is written, where that differs from transformers' own way.
    """

    model_type: str
    architecture: str
    reward: bool = False
    family: str | None = None
    norm: Norm = "rmsnorm"
    norm_placement: NormPlacement = "pre"
    qk_norm: QkNorm = "none"
    attention_bias: tuple[AttentionBias, ...] = ("none",)
    windows: Windows = "none"
    gated: bool = True
    router_orders: tuple[RouterOrder, ...] = ("softmax_topk", "topk_softmax")
    shared: bool = False
    dense_layers: bool = False
    ahead: bool = False
    generic: bool = False
    float32_router: bool = False
    scale_field: str | None = None
    layout: Layout
    blocks: tuple[str, ...] = ("mlp",)
    router_module: str = "mlp.gate"
    indices_first_before: tuple[int, int] | None = None
    fields: Callable[[DenseModel, MoeShape], dict[str, Any]]
    padding: Padding | None = None
    old_names: Mapping[str, str] = field(default_factory=dict)
    spelling: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None

    def objections(self, model: DenseModel, moe: MoeShape, *, ahead: bool = False) -> tuple[Objection, ...]:
        """Everything in the request that this type cannot express exactly; empty if it fits.

        Args:
            model: the dense model.
            moe: the request.
            ahead: whether a new block for multi-token prediction is asked for.
        """
        beyond = self._ahead_objections(ahead or bool(model.ahead_shapes()))
        if self.generic:
            return beyond
        head = Objection(field="head", found=model.head.name, expressible=CAUSAL.name)
        unexpressed = () if self.reward or model.head is CAUSAL else (head,)
        return (*beyond, *unexpressed, *self._backbone_objections(model), *self._moe_objections(model, moe))

    def _ahead_objections(self, ahead: bool) -> tuple[Objection, ...]:
        if self.ahead or not ahead:
            return ()
        return (Objection(field="multi-token prediction", found="there", expressible="none (mtp=none)"),)

    def _backbone_objections(self, model: DenseModel) -> list[Objection]:
        if self.family == model.family.model_type:
            return []
        backbone, found = model.backbone, []
        if self.family:
            found.append(Objection(field="architecture", found=model.family.model_type, expressible=self.family))
        pairs: list[tuple[str, str, tuple[str, ...]]] = [
            ("norm", backbone.norm, (self.norm,)),
            ("norm placement", backbone.norm_placement, (self.norm_placement,)),
            ("query/key norm", backbone.qk_norm, self._equivalent_qk_norms(model)),
            ("attention bias", backbone.attention_bias, self.attention_bias),
            ("sliding windows", window_kind(backbone.windows), _expressible_windows(self.windows)),
        ]
        for name, value, allowed in pairs:
            if value not in allowed:
                found.append(Objection(field=name, found=value, expressible=" or ".join(allowed)))
        found += [Objection(field="backbone", found=extra, expressible="no such feature") for extra in backbone.extras]
        return found

    def _equivalent_qk_norms(self, model: DenseModel) -> tuple[str, ...]:
        # OLMoE's norm over all heads has the hidden size, whatever the heads' size.
        single_head = model.sizes["Q"] == model.sizes["K"] == model.sizes["D"] == model.hidden_size
        if single_head and self.qk_norm != "none":
            return ("head", "full")
        return (self.qk_norm,)

    def _moe_objections(self, model: DenseModel, moe: MoeShape) -> list[Objection]:
        checks = [
            (model.gated != self.gated, "FFN", GATED[model.gated], GATED[self.gated]),
            (model.ffn_bias, "FFN bias", "present", "none"),
            (bool(model.family.ffn.dropout), "FFN dropout", "present", "none"),
            (moe.router_order not in self.router_orders, "router order", moe.router_order, self.router_orders[0]),
            (moe.shared_width > 0 and not self.shared, "shared experts", f"of width {moe.shared_width}", "none"),
            (len(moe.layers) < len(model.ffn_layers) and not self.dense_layers, "dense layers", "some", "none"),
            (moe.latent is not None and self.layout.latent is None, "moe.latent", str(moe.latent), "null"),
            (moe.groups in ("whole", "positions"), "moe.groups", moe.groups, _PLAIN_TOP_K),
        ]
        return [Objection(field=name, found=found, expressible=can) for wrong, name, found, can in checks if wrong]


GATED = {True: "gated", False: "un-gated"}
# All that a type whose routers take the top-k of all experts can do for groups.
_PLAIN_TOP_K = "tied (the router rows of a group stay equal, so that its top-k keeps groups whole) or free"


def _expressible_windows(widest: str) -> tuple[str, ...]:
    kinds = ("none", "uniform", "mixed")
    return kinds[: kinds.index(widest) + 1]


# What a dense config says about the file it came from, not about the model.
OF_THE_FILE = ("_name_or_path", "dtype", "transformers_version")

CARRIED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "tie_word_embeddings",
    "rope_parameters",
    "attention_dropout",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)


def native_fields(model: DenseModel) -> dict[str, Any]:
    """The fields of config.json that every native type takes over from the dense model unchanged."""
    fields = {name: getattr(model.config, name) for name in CARRIED}
    # Always, because transformers' scaled rotary embeddings multiply MixtralConfig's default of None.
    return {**fields, "hidden_act": model.activation, "head_dim": model.sizes["D"]}


def router_fields(moe: MoeShape) -> dict[str, Any]:
    """The router's fields of the types in whose config the order of softmax and top-k is a flag."""
    return {
        "num_experts": moe.experts,
        "num_experts_per_tok": moe.top_k,
        "norm_topk_prob": moe.router_order == "topk_softmax",
    }


def dense_layer_indices(model: DenseModel, moe: MoeShape) -> list[int]:
    """Layers that keep their FFN."""
    return sorted(set(model.ffn_layers) - set(moe.layers))
