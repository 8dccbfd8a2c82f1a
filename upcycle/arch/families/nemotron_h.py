"""Nemotron-H (arXiv 2504.03624), Nemotron Nano 2 and 3: Mamba-2, attention and squared-ReLU FFNs, one to a layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from upcycle.arch.backbone import Backbone
from upcycle.arch.family import Ahead, Family, Ffn, Kind
from upcycle.errors import SourceError

if TYPE_CHECKING:
    from collections.abc import Mapping

# One letter for each kind of layer, as in hybrid_override_pattern, and what newer and older transformers call them.
LETTERS = {"M": ("linear_attention", "mamba"), "*": ("full_attention", "attention"), "-": ("mlp",), "E": ("moe",)}
NORM = {"norm.weight": "H"}


def pattern(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """The letter of every layer.

    Raises:
        SourceError: config.json names none, unknown ones, or different ones in its two ways to do so.
    """
    text, names = fields.get("hybrid_override_pattern"), fields.get("layers_block_type") or fields.get("layer_types")
    known = {name: letter for letter, names in LETTERS.items() for name in names}
    if names is None and text is None:
        raise SourceError(
            "config.json does not say which kind each layer is",
            found="neither hybrid_override_pattern nor layers_block_type",
            remedy="take a complete config.json",
        )
    unknown = sorted({*(text or ""), *(known.get(name, name) for name in names or ())} - set(LETTERS))
    if unknown:
        raise SourceError(
            "config.json has layers of an unknown kind",
            found=", ".join(map(repr, unknown)),
            expected="; ".join(f"{letter} ({' or '.join(names)})" for letter, names in LETTERS.items()),
        )
    listed = tuple(known[name] for name in names) if names is not None else tuple(text or "")
    if text is not None and tuple(text) != listed:
        raise SourceError(
            "hybrid_override_pattern and layers_block_type of config.json disagree",
            found=f"{text} and {''.join(listed)}",
            remedy="delete the wrong one: transformers reads layers_block_type, other engines the pattern",
        )
    return listed


def ahead_pattern(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """The letter of every layer of one depth of multi-token prediction.

    Raises:
        SourceError: as `pattern`.
    """
    text, names = fields.get("mtp_hybrid_override_pattern"), fields.get("mtp_layers_block_type")
    return pattern({"hybrid_override_pattern": text, "layers_block_type": names})


def ahead_as_model(fields: Mapping[str, Any]) -> dict[str, Any]:
    names = [LETTERS[letter][0] for letter in ahead_pattern(fields)]
    return {**fields, "layers_block_type": names, "num_nextn_predict_layers": 0}


def ahead_fields(kinds: tuple[str, ...]) -> dict[str, Any]:
    return {"num_nextn_predict_layers": 1, "mtp_layers_block_type": [LETTERS[kind][0] for kind in kinds]}


def symbols(config: Any) -> dict[str, int]:
    """Sizes of a Mamba-2 layer, and of a mixture of experts.

    I channels, S heads in G groups, N states; C channels of the convolution, W its width; R rows of in_proj.
    """
    heads, states = config.mamba_num_heads, config.ssm_state_size
    inner, inputs = heads * config.mamba_head_dim, 2 * config.n_groups * states
    convolution = {"C": inner + inputs, "W": config.conv_kernel}
    mixture = {
        "experts": config.n_routed_experts,
        "expert": config.moe_intermediate_size,
        "shared": config.moe_shared_expert_intermediate_size or config.intermediate_size,
        "latent": config.moe_latent_size or config.hidden_size,
    }
    return {
        "I": inner,
        "S": heads,
        "G": config.n_groups,
        "N": states,
        **convolution,
        "R": 2 * inner + inputs + heads,
        **mixture,
    }


def backbone(config: Any) -> Backbone:
    """Describe what is not an FFN.

    Raises:
        SourceError: no layer is attention, without which transformers cannot run the model.
    """
    if "*" not in pattern(config.to_dict()):
        raise SourceError(
            "the model has no attention layer, and transformers' cache for this architecture needs one",
            found="".join(pattern(config.to_dict())),
            expected="at least one layer of kind * (attention)",
            remedy="take a model with attention: none of this kind can be run, and so none be verified",
        )
    return Backbone(windows=(0,) * config.num_hidden_layers, extras=("Mamba-2", "one sub-block a layer"))


FAMILY = Family(
    model_type="nemotron_h",
    layer="backbone.layers.{layer}.",
    base_prefix="backbone.",
    module_prefix="model.",
    outer={"backbone.embeddings.weight": "V H", "backbone.norm_f.weight": "H"},
    kinds={
        "M": Kind(
            mixer="mamba2",
            tensors={
                **NORM,
                "mixer.in_proj.weight": "R H",
                "mixer.conv1d.weight": "C 1 W",
                "mixer.dt_bias": "S",
                "mixer.A_log": "S",
                "mixer.D": "S",
                "mixer.norm.weight": "I",
                "mixer.out_proj.weight": "H I",
            },
            optional={
                "use_conv_bias": {"mixer.conv1d.bias": "C"},
                "use_bias": {"mixer.in_proj.bias": "R", "mixer.out_proj.bias": "H"},
            },
        ),
        "*": Kind(
            mixer="attention",
            tensors={
                **NORM,
                "mixer.q_proj.weight": "Q H",
                "mixer.k_proj.weight": "K H",
                "mixer.v_proj.weight": "K H",
                "mixer.o_proj.weight": "H Q",
            },
        ),
        "-": Kind(tensors=NORM, ffn=Ffn(module="mixer", gate=None, bias="mlp_bias")),
        "E": Kind(
            experts=True,
            tensors={
                **NORM,
                "mixer.gate.weight": "experts H",
                "mixer.gate.e_score_correction_bias": "experts",
                "mixer.experts.{expert}.up_proj.weight": "expert latent",
                "mixer.experts.{expert}.down_proj.weight": "latent expert",
                "mixer.shared_experts.up_proj.weight": "shared H",
                "mixer.shared_experts.down_proj.weight": "H shared",
            },
            optional={
                "moe_latent_size": {
                    "mixer.fc1_latent_proj.weight": "latent H",
                    "mixer.fc2_latent_proj.weight": "H latent",
                },
            },
        ),
    },
    pattern=pattern,
    more_symbols=symbols,
    activation="mlp_hidden_act",
    ties_embeddings=False,
    ahead=Ahead(
        layer="mtp.layers.{layer}.",
        depths="num_nextn_predict_layers",
        pattern=ahead_pattern,
        as_model=ahead_as_model,
        fields=ahead_fields,
        first={"enorm.weight": "H", "hnorm.weight": "H", "eh_proj.weight": "H 2*H"},
        last={"final_layernorm.weight": "H"},
    ),
    backbone=backbone,
)
