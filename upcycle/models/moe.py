"""Reads what a MoE checkpoint is from its config.json and manifest."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upcycle.arch.backbone import (
    head_size,
    layer_windows,
    optional_bias,
    rope_type,
    usual_mamba_biases,
    window_kind,
)
from upcycle.arch.engines import Features
from upcycle.arch.families import FAMILIES
from upcycle.arch.head import REWARD, head_of
from upcycle.arch.padding import PADDED
from upcycle.arch.targets import TARGETS
from upcycle.errors import SourceError
from upcycle.models.config import load_config, read_config
from upcycle.models.manifest import read_manifest
from upcycle.models.transformers_version import installed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from upcycle.arch.family import Family
    from upcycle.arch.target import Target
    from upcycle.plan.plan import Plan


@dataclass(frozen=True, kw_only=True)
class MoeDescription:
    """A MoE checkpoint.

    Attributes:
        target: its type.
        layer_path: prefix of a layer's modules, with `{layer}` left open.
        stored_layer: the same of its tensors on disk.
        ffn: what stands in the place of an FFN, inside the layer.
        layer_count: number of layers, MoE or not.
        layers: indices of the MoE layers.
        experts, top_k, expert_width, shared_width: sizes.
        limits: (n, k): experts come from the best k of n groups of neighbours (arXiv 2412.19437); (1, 1) from all.
        granularity: G, experts per virtual group; 1 where nothing says otherwise.
        groups: how experts of virtual groups are chosen, as `ExpertSelection` says; free where nothing says otherwise.
        router_order: softmax_topk, topk_softmax or sigmoid_topk.
        renormalise, scaling_factor: what is done with a sigmoid_topk's weights, as `ExpertSelection` says.
        gated: whether the experts have a gate.
        hidden_size, vocabulary: sizes.
        latent: size in which routed experts compute; None: in the hidden size.
        ahead_layers: MoE layers of the block for multi-token prediction that it has in memory, counted on from its own.
    """

    target: Target
    layer_path: str
    stored_layer: str
    ffn: str
    layer_count: int
    layers: tuple[int, ...]
    experts: int
    top_k: int
    expert_width: int
    shared_width: int
    limits: tuple[int, int]
    granularity: int
    groups: str
    router_order: str
    renormalise: bool
    scaling_factor: float
    gated: bool
    hidden_size: int
    vocabulary: int
    latent: int | None
    ahead_layers: tuple[int, ...] = ()

    @property
    def model_type(self) -> str:
        return self.target.model_type

    @property
    def name(self) -> str:
        count = self.shared_width // self.expert_width
        shared = f"S{count}" if count else ""
        return f"E{self.experts // self.granularity}G{self.granularity}T{self.top_k}{shared}"

    def block_paths(self, layer: int) -> list[str]:
        """Modules in memory whose outputs together are the MoE block's."""
        return [self.layer_path.format(layer=layer) + name.format(ffn=self.ffn) for name in self.target.blocks]

    def router_path(self, layer: int) -> str:
        """Its router in memory, of a layer of a block for multi-token prediction too."""
        return self._in_memory(layer) + self.target.router_module.format(ffn=self.ffn)

    def ahead_place(self, layer: int) -> int:
        """The index within its block of a layer that is counted on from the model's own."""
        return layer - self.layer_count

    def _in_memory(self, layer: int) -> str:
        if layer < self.layer_count:
            return self.layer_path.format(layer=layer)
        ahead = FAMILIES[str(self.target.family)].ahead
        assert ahead
        return ahead.layer.format(layer=self.ahead_place(layer))

    @property
    def indices_first(self) -> bool:
        """Whether its router returns (indices, weights, logits), and not (logits, weights, indices)."""
        before = self.target.indices_first_before
        return before is not None and installed() < before

    def chosen(self, output: tuple[Tensor, ...]) -> Tensor:
        """The indices of the chosen experts [T, K] in what its router returned."""
        return output[0 if self.indices_first else 2]

    def expert_names(self) -> Iterator[str]:
        """What the routed experts' tensors may be called on disk."""
        names = [each for name in self.target.layout.experts.values() for each in (name, f"{name}_bias")]
        for layer in self.layers:
            start = self.stored_layer.format(layer=layer)
            for name in names:
                for expert in range(self.experts if "{expert}" in name else 1):
                    yield start + name.format(expert=expert, ffn=self.ffn)

    def experts_path(self, layer: int) -> str:
        return self.router_path(layer).rpartition(".")[0] + ".experts"


def regrouped(moe: MoeDescription, groups: str) -> MoeDescription:
    """A MoE whose experts are chosen in another way; auto leaves it as it is."""
    return moe if groups == "auto" else replace(moe, groups=groups)


def describe_moe(directory: Path) -> MoeDescription:
    """Describe a MoE checkpoint.

    Raises:
        SourceError: no checkpoint there, one that cannot be read, or not a MoE type that upcycle knows.
    """
    raw = read_config(directory)
    target = target_of(raw)
    if target is None:
        raise SourceError(
            "not a mixture of experts that upcycle knows",
            found=f"model_type={raw.get('model_type')}",
            expected=", ".join(TARGETS),
        )
    return describe_config(target, load_config(directory), read_manifest(directory))


def planned_model(plan: Plan) -> tuple[Any, MoeDescription]:
    """The transformers configuration of what a plan would write, and its shape."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(**plan.config)
    return config, describe_config(TARGETS[plan.target], config, planned_groups(plan))


def planned_groups(plan: Plan) -> dict[str, Any]:
    """What of a manifest a native type's config does not say."""
    return {"moe": {"granularity": plan.moe.granularity, "groups": plan.moe.groups}}


def target_of(fields: Mapping[str, Any]) -> Target | None:
    """The MoE type of a model with these fields in config.json; None where it is dense, or upcycle does not know it.

    Raises:
        SourceError: its layers are of no kind that its type has.
    """
    target = TARGETS.get(str(fields.get("model_type")))
    if target and target.family and not _expert_layers(FAMILIES[target.family], fields):
        return None
    return target


def is_mixture(given: str) -> bool:
    """Whether a directory holds a mixture of experts that upcycle knows."""
    directory = Path(given).expanduser()
    return (directory / "config.json").is_file() and target_of(read_config(directory)) is not None


def ahead_layers(config: Any) -> tuple[int, ...]:
    """Indices, counted on from its last layer, of the MoE layers for multi-token prediction that a config tells of."""
    family, fields = FAMILIES.get(config.model_type), config.to_dict()
    ahead = family.ahead if family else None
    if family is None or ahead is None or not fields.get(ahead.depths):
        return ()
    layers = len(family.layer_kinds(fields, 0))
    kinds = ahead.pattern(fields)
    return tuple(layers + place for place, kind in enumerate(kinds) if family.kinds[kind].experts)


def _expert_layers(family: Family, fields: Mapping[str, Any]) -> tuple[int, ...]:
    kinds = family.layer_kinds(fields, 0)
    return tuple(layer for layer, kind in enumerate(kinds) if family.kinds[kind].experts)


def describe_config(target: Target, config: Any, manifest: dict[str, Any] | None) -> MoeDescription:
    """Describe a MoE from its transformers configuration.

    Raises:
        SourceError: it chooses groups of experts by their best two, and they have fewer.
    """
    generic, text = target.generic, config.get_text_config()
    layers = text.num_hidden_layers
    dense = set(getattr(config, "mlp_only_layers", None) or ())
    step = getattr(config, "decoder_sparse_step", 1)
    sparse = tuple(layer for layer in range(layers) if layer not in dense and (layer + 1) % step == 0)
    family = FAMILIES[text.model_type] if generic or target.family else None
    layer = family.layer if family else "model.layers.{layer}."
    in_memory = target.layout.prefix + (family.in_memory(layer) if family else layer)
    if family and target.family:
        sparse = _expert_layers(family, config.to_dict())
    shared = ("shared_expert_intermediate_size", "shared_intermediate_size", "moe_shared_expert_intermediate_size")
    made = (manifest or {}).get("moe", {})
    own = {**vars(config), **getattr(config, PADDED, {})}
    renormalised = getattr(config, "norm_topk_prob", "softmax_topk" not in target.router_orders)
    return MoeDescription(
        target=target,
        layer_path=in_memory,
        stored_layer=in_memory if generic else layer,
        ffn=family.ffn.module if family else "",
        layer_count=layers,
        layers=tuple(config.moe_layers) if generic else sparse,
        experts=getattr(config, "num_experts", None) or config.num_local_experts,
        top_k=config.num_experts_per_tok,
        expert_width=getattr(config, "moe_intermediate_size", None) or config.intermediate_size,
        shared_width=next((own[name] for name in shared if name in own), 0),
        limits=_limits(config),
        granularity=config.granularity if generic else made.get("granularity", 1),
        groups=config.groups if generic else made.get("groups", "free"),
        router_order=_order(target, config, renormalised=renormalised),
        renormalise=renormalised,
        scaling_factor=getattr(config, "routed_scaling_factor", 1.0),
        gated=config.gated if generic else target.gated,
        hidden_size=text.hidden_size,
        vocabulary=text.vocab_size,
        latent=getattr(config, "moe_latent_size", None),
    )


def _limits(config: Any) -> tuple[int, int]:
    groups, chosen = getattr(config, "n_group", 1) or 1, getattr(config, "topk_group", 1) or 1
    experts = getattr(config, "n_routed_experts", 0)
    if groups > 1 and (experts % groups or experts // groups < 2):
        raise SourceError(
            "config.json divides the experts into groups that have no two best experts to be chosen by",
            found=f"n_group={groups}, {experts} experts",
            expected="groups of equal size, of 2 experts or more",
            remedy="set n_group and topk_group to 1 in config.json to choose among all experts",
        )
    return groups, min(chosen, groups)


def _order(target: Target, config: Any, *, renormalised: bool) -> str:
    if target.generic:
        return str(config.router_order)
    if target.router_orders == ("sigmoid_topk",):
        return "sigmoid_topk"
    return "topk_softmax" if renormalised else "softmax_topk"


def _could_be_mixtures(text: Any) -> int:
    """How many layers have an FFN, or experts in the place of one."""
    family, layers = FAMILIES.get(text.model_type), int(text.num_hidden_layers)
    if family is None:
        return layers
    kinds = (family.kinds[kind] for kind in family.layer_kinds(text.to_dict(), layers))
    return sum(bool(kind.ffn or kind.experts) for kind in kinds)


def config_features(target: Target, config: Any, *, portable: bool) -> Features:
    """What of a checkpoint other engines may not be able to do, from its transformers configuration."""
    moe, text = describe_config(target, config, None), config.get_text_config()
    return Features(
        router_order=moe.router_order,
        shared=moe.shared_width > 0,
        dense_layers=len(moe.layers) < _could_be_mixtures(text),
        windows=window_kind(layer_windows(text)),
        attention_bias="qkv" if getattr(text, "qkv_bias", False) else optional_bias(text),
        rope=rope_type(text),
        heads_fill=head_size(text) * text.num_attention_heads == text.hidden_size,
        tied=text.tie_word_embeddings,
        portable=portable,
        reward=head_of(config.to_dict()) is REWARD,
        usual_mamba_biases=usual_mamba_biases(text),
    )
