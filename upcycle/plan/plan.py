"""The frozen plan, and how it is built."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from upcycle.arch.engines import Serving, features, serving
from upcycle.arch.family import describe
from upcycle.arch.head import head_fields
from upcycle.arch.padding import PADDED
from upcycle.plan.ahead import ahead_notes, block_kinds, block_tensors, check_kept
from upcycle.plan.coverage import check_coverage
from upcycle.plan.experts import router_deviation
from upcycle.plan.groups import group_notes
from upcycle.plan.latent import Latents, latent_losses, latent_notes
from upcycle.plan.scaling import LayerScaling, in_config, layer_scaling, lossless
from upcycle.plan.tensors import TargetTensor, Tensors, ffn_tensors
from upcycle.plan.unread import unread_fields

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from upcycle.arch.family import DenseModel
    from upcycle.arch.moe import MoeShape
    from upcycle.arch.target import Target
    from upcycle.options.config import InitConfig

# Where a power law through the measured gaps (see DEFAULT_SPREAD) reaches the report's tolerance of 0.1 %.
LOSSLESS_SPREAD = 0.027


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything `convert` will do.

    Attributes:
        target: MoE type.
        why: reasons for the type, one line each.
        moe, init: the request.
        router_std: standard deviation of the router's rows.
        config: config.json to write, without dtype and versions.
        tensors: what to write, in order.
        dropped: source tensor -> why it is not taken over.
        scaling: factors of each MoE layer.
        serving: what other engines do with it.
        losses: why step 0 will differ from the dense model, one line each; empty if it will not.
        notes: what else a user should know.
        latents: what was computed for latent projections.
    """

    target: str
    why: tuple[str, ...]
    moe: MoeShape
    init: InitConfig
    router_std: float
    config: Mapping[str, Any]
    tensors: tuple[TargetTensor, ...]
    dropped: Mapping[str, str]
    scaling: Mapping[int, LayerScaling]
    serving: tuple[Serving, ...]
    losses: tuple[str, ...]
    notes: tuple[str, ...]
    latents: Latents

    def fingerprint(self) -> str:
        """SHA-256 of everything that decides the bytes, apart from the source's values and the seed."""
        tensors = [(t.name, t.shape, t.dtype, [repr(part) for part in t.parts]) for t in self.tensors]
        computed = [dict(self.latents.sha256)] if self.latents.sha256 else []
        text = json.dumps([self.target, dict(self.config), tensors, *computed], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def build_plan(
    model: DenseModel,
    moe: MoeShape,
    init: InitConfig,
    target: Target,
    why: Sequence[str],
    *,
    dtypes: Mapping[str, str],
    masses: Mapping[int, float],
    dropped: Mapping[str, str],
    portable: bool,
    latents: Latents | None = None,
    block: str | None = None,
) -> Plan:
    """Plan a conversion.

    Args:
        model: the dense model.
        moe: the MoE's shape.
        init: how experts and router start.
        target: a type that has no objections.
        why: the reasons for the type.
        dtypes: safetensors code of every source tensor after conversion to the output's dtype.
        masses: router weight of the selected experts together, by layer, expected or measured.
        dropped: stored tensors that the model does not need, and why.
        portable: whether to write what other engines need.
        latents: what was computed for latent projections; None where nothing was.
        block: how a new block for multi-token prediction starts; None where none is made.

    Raises:
        ConfigError: the model has no layers that such a block could be made of.
        TargetError: the type cannot describe the layers for multi-token prediction that are kept.
    """
    latents = latents or Latents()
    gated, family = model.gated, model.family.model_type
    ffn: dict[str, Any] = {"granularity": moe.granularity, "activation": model.activation, "gated": gated}
    field = target.scale_field
    scaling = {
        layer: layer_scaling(init.scaling, mass=masses[layer], **ffn, field=field is not None) for layer in moe.layers
    }
    router_std = router_deviation(init, model.hidden_size)
    config = {"model_type": target.model_type, **target.fields(model, moe), **head_fields(model.head, model.config)}
    if field:
        config[field] = scaling[moe.layers[0]].output if in_config(init.scaling) else 1.0
    if block:
        assert model.family.ahead
        config |= model.family.ahead.fields(block_kinds(model.family, config))
    padding = target.padding if portable else None
    padded = padding.fields(config) if padding else {}
    tensors = tuple(
        Tensors(
            model=model,
            moe=moe,
            init=init,
            target=target,
            dtypes=dtypes,
            scaling=scaling,
            padding=padding,
            padded=padded.get(PADDED, {}),
            latents=latents,
        ).all()
    )
    written = _described(model, config) if target.ahead else model
    if block:
        tied = {target.layout.router: moe.granularity if moe.groups == "tied" else 1}
        own = {tensor.name: tensor for tensor in tensors}
        tensors += tuple(block_tensors(written, own, block, tied=tied, option="mtp"))
    else:
        check_kept(model, written)
    if init.name == "random":
        reason = "replaced by random experts"
        dropped = {**dropped, **{name: reason for layer in moe.layers for name, _ in ffn_tensors(model, layer)}}
    exact_scale = all(lossless(init.scaling, mass=masses[layer], **ffn) for layer in moe.layers)
    lost, stray = ({}, {}) if target.generic or target.family else unread_fields(model.config, config)
    plan = Plan(
        target=target.model_type,
        why=tuple(why),
        moe=moe,
        init=init,
        router_std=router_std,
        config={**config, **padded},
        tensors=tensors,
        dropped=dropped,
        scaling=scaling,
        serving=serving(target.model_type, features(model, moe, portable=portable)),
        losses=(
            *_losses(moe, init, exact_scale=exact_scale, spread=router_std * model.hidden_size**0.5),
            *latent_losses(moe.latent, init, model.hidden_size, latents),
            *(f"{target.model_type} has no field for config.json's {name}={lost[name]}" for name in lost),
        ),
        notes=(
            *_notes(moe, init, target, router_std),
            *latent_notes(moe.latent, init, model.hidden_size),
            *(ahead_notes(written, block) if block else ()),
            *(f"config.json's {name}={stray[name]} is not taken over: {family} has no such field" for name in stray),
        ),
        latents=latents,
    )
    check_coverage(tensors, model.tensors(), dropped=dropped)
    return plan


def _described(model: DenseModel, config: Mapping[str, Any]) -> DenseModel:
    """The MoE that is written, of its dense model's own family."""
    from transformers import AutoConfig

    return describe(model.family, AutoConfig.for_model(**config), model.head)


def _losses(moe: MoeShape, init: InitConfig, *, exact_scale: bool, spread: float) -> Iterator[str]:
    if moe.shared == "whole" and init.name != "random":
        return  # routed experts add 0
    if moe.router_order == "softmax_topk" and moe.top_k < moe.experts and spread > LOSSLESS_SPREAD:
        yield f"init.router_std={init.router_std:g} is large: the weight of the selected experts varies between tokens"
    if not exact_scale and init.name != "random":
        yield f"init.scaling={init.scaling} does not undo the router's weights exactly for this activation"
    if init.name == "random":
        yield "init=random: nothing of the dense FFNs is kept"
    if init.name == "copy" and moe.granularity > 1 and moe.groups != "positions":
        yield "init=copy with granularity > 1: experts are chosen one by one, so those selected are not a whole FFN"
    if init.name == "drop" and init.ratio:
        yield f"init=drop: {init.ratio:g} of each expert's neurons start anew"
    if init.name == "noise" and init.std and init.fraction:
        yield f"init=noise: N(0, {init.std:g} std) on {init.fraction:g} of each expert's weights"


def _notes(moe: MoeShape, init: InitConfig, target: Target, router_std: float) -> Iterator[str]:
    if moe.router_order == "softmax_topk" and moe.shared != "whole" and init.scaling in ("exact", "down", "calibrated"):
        yield f"what remains comes from the router's spread (init.router_std={router_std:g})"
    if init.scaling == "calibrated":
        yield "convert measures the factors layer by layer; plan shows the expected ones"
    if not (target.generic or target.float32_router):
        logits = f"{target.model_type} computes router logits in the model's dtype"
        yield f"{logits}: in bfloat16 about 0.5% of tokens split a group"
    yield from group_notes(moe)


def plan_dict(plan: Plan) -> dict[str, Any]:
    """The plan as plain data, for JSON."""
    return {
        "target": plan.target,
        "why": list(plan.why),
        "moe": {"name": plan.moe.name, "experts": plan.moe.experts, **asdict(plan.moe)},
        "init": {**asdict(plan.init), "router_std": plan.router_std},
        "lossless": not plan.losses,
        "engines": {each.engine: {"verdict": each.verdict, "why": each.why} for each in plan.serving},
        "losses": list(plan.losses),
        "notes": list(plan.notes),
        **({"latent": _latents(plan)} if plan.moe.latent else {}),
        "scaling": {str(layer): asdict(factors) for layer, factors in plan.scaling.items()},
        "dropped": dict(plan.dropped),
        "config": dict(plan.config),
        "tensors": {
            tensor.name: {"dtype": tensor.dtype, "shape": list(tensor.shape), "from": tensor.provenance}
            for tensor in plan.tensors
        },
    }


def _latents(plan: Plan) -> dict[str, Any]:
    """What was computed for latent projections; of neurons, those that the shared expert takes."""
    latents, shared = plan.latents, plan.moe.shared_width
    return {
        "sha256": dict(latents.sha256),
        "errors": {str(layer): error for layer, error in latents.errors.items()},
        "shared_neurons": {str(layer): list(order[:shared]) for layer, order in latents.neurons.items()},
    }
