"""Requests, conversions and comparisons that the tests share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from models import config, token_ids
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from upcycle.arch.families import FAMILIES
from upcycle.arch.family import describe
from upcycle.convert.run import convert
from upcycle.options.config import ConvertConfig, InitConfig, MoeConfig
from upcycle.plan.groups import settled
from upcycle.plan.plan import build_plan
from upcycle.plan.request import moe_shape
from upcycle.plan.scaling import expected_mass
from upcycle.plan.select import own_order, select_target

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import Tensor, nn

    from upcycle.arch.family import DenseModel
    from upcycle.convert.prepare import Conversion
    from upcycle.plan.plan import Plan

ROUTER_ORDERS = ("softmax_topk", "topk_softmax")
# A much smaller one lets two groups tie in float32 now and then, which would break both.
ROUTER_STD = 2e-5
# Softmax-then-topK weighs a group by its probability: ROUTER_STD keeps it within about 1e-4 of 1/E, and the largest
# difference seen is 3e-3. With topK-then-softmax only the order of sums differs: 4e-6.
TOLERANCE = {"softmax_topk": 6e-3, "topk_softmax": 1e-5}


def options(
    source: Path | str, output: Path | str, *, init: str = "virtual_group", latent_start: str = "exact", **changes: Any
) -> ConvertConfig:
    """Options of `convert`: E4G2T2, and what is named; names of `moe.*` and `init.*` are given without the prefix.

    `latent` is of `moe`, and `latent_start` of `init`.
    """
    moe = MoeConfig(
        expansion=4,
        granularity=2,
        top_k=2,
        router_order="softmax_topk",
        shared_experts=0,
        shared_neurons=None,
        layers="all",
        groups="auto",
        latent=None,
    )
    start = InitConfig(name=init, scaling="exact", router_std=ROUTER_STD, ratio=0.5, std=0.1, latent=latent_start)
    request = ConvertConfig(
        source=str(source),
        output=str(output),
        target="auto",
        portable=True,
        mtp="keep",
        dtype="auto",
        seed=0,
        max_shard_size="5GB",
        workers=1,
        calibration_tokens=64,
        moe=moe,
        init=start,
        overwrite=False,
        resume=False,
        part=None,
        verify=False,
    )
    for part in ("moe", "init"):
        before = getattr(request, part)
        named = {name: changes.pop(name) for name in list(changes) if hasattr(before, name)}
        request = replace(request, **{part: replace(before, **named)})
    return replace(request, **changes)


@dataclass(frozen=True, kw_only=True)
class Converted:
    """An output and the plan that made it."""

    directory: Path
    plan: Plan


def run(config: ConvertConfig) -> Converted:
    """Convert, and keep the plan."""
    seen: list[Conversion] = []

    def on_plan(conversion: Conversion, _nbytes: int) -> Callable[[int], None]:
        seen.append(conversion)
        return lambda _count: None

    directory = convert(config, on_plan=on_plan)
    return Converted(directory=directory, plan=seen[0].plan)


def described(name: str, **changes: Any) -> DenseModel:
    """A model of the table as names and shapes, with fields of its config changed."""
    made = config(name, **changes)
    return describe(FAMILIES[made.model_type], made)


def planned(model: DenseModel, **changes: Any) -> Plan:
    """The plan for a model of which only the config is there."""
    request = options("source", "output", **changes)
    sizes: dict[str, Any] = {"ffn_width": model.ffn_width, "layers": model.ffn_layers}
    sizes["hidden_size"] = model.hidden_size
    moe = moe_shape(request.moe, request.init, **sizes, order=own_order(model.family.model_type))
    target, why = select_target(request.target, model, moe, portable=request.portable)
    moe = settled(moe, request.init, target)
    dtypes, masses = dict.fromkeys(model.tensors(), "F32"), dict.fromkeys(moe.layers, expected_mass(moe))
    given = {"dtypes": dtypes, "masses": masses, "dropped": {}, "portable": request.portable}
    return build_plan(model, moe, request.init, target, why, **given)


def load(directory: Path, **arguments: Any) -> nn.Module:
    """A checkpoint through plain transformers, in float32, refusing missing, unexpected and mismatched tensors."""
    defaults = {"dtype": torch.float32, "experts_implementation": "eager"}
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True, **defaults | arguments)
    problems = {kind: found for kind, found in info.items() if found}
    assert not problems, problems
    return model.eval()


def outputs(directory: Path) -> dict[str, Tensor]:
    """What a checkpoint computes for the test sequences, in float32.

    The logits, and what goes into every norm that follows an FFN, because such a norm hides a wrong scale.
    """
    model, seen = load(directory), {}
    for name, module in model.named_modules():
        if name.endswith("post_feedforward_layernorm"):
            key = name.removeprefix("language_model.")
            module.register_forward_pre_hook(lambda _module, inputs, key=key: seen.update({key: inputs[0]}))
    with torch.inference_mode():
        return {"logits": model(token_ids()).logits, **seen}


def gap(directory: Path, dense: Mapping[str, Tensor]) -> float:
    """Largest difference between what a checkpoint and the dense model compute; the values are of order 1."""
    found = outputs(directory)
    assert found.keys() == dense.keys()
    return max(float((found[name] - dense[name]).abs().max()) for name in dense)


def assert_lossless(directory: Path, dense: Mapping[str, Tensor], tolerance: float) -> None:
    """The one assertion of losslessness, which every mutant must fail."""
    found = gap(directory, dense)
    assert found <= tolerance, f"differs by {found:.2g} from the dense model, tolerance {tolerance:g}"


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint."""
    return {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()}


def edit(directory: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of a one-file checkpoint in place."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
