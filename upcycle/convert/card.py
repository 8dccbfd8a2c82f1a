"""The model cards of converted and of trained checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from upcycle.arch.head import CAUSAL, OFFSETS, REWARD, attributes_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from upcycle.arch.engines import Serving
    from upcycle.arch.head import Head
    from upcycle.convert.prepare import Conversion

PIPELINES = {CAUSAL.name: "text-generation", REWARD.name: "text-classification"}


def model_card(manifest: Mapping[str, Any], conversion: Conversion, remarks: Sequence[str]) -> str:
    """README.md in the Hub's format.

    Args:
        manifest: the checkpoint's.
        conversion: what was written.
        remarks: what a user of the tokenizer should know.
    """
    plan, model = conversion.plan, conversion.source.model
    moe, cost = plan.moe, manifest["cost"]
    step_0 = "\n".join(f"- {line}" for line in plan.losses) or "- equals the dense model up to rounding"
    notes = "\n".join(f"- {line}" for line in plan.notes)
    latent = f"\n| latent | routed experts compute in {moe.latent} dimensions |" if moe.latent else ""
    active = f"{cost['active_parameters']:,} active"
    if cost["ahead_parameters"]:
        active += f", {cost['ahead_parameters']:,} for multi-token prediction"
    zeros = ""
    if cost["padding_bytes"]:
        zeros = (
            f"\n| for other engines, besides | {cost['padding_parameters']:,} zeros,"
            f" {cost['padding_flops_per_token']:,} FLOPs per token, {cost['padding_bytes']:,} bytes; `portable=false`"
            " leaves them out |"
        )
    return f"""---
library_name: transformers
pipeline_tag: {PIPELINES[model.head.name]}
tags: [moe, upcycling, {plan.target}]
---

# {moe.name} mixture of experts, upcycled from `{manifest["source"]["given"]}`

| | |
|---|---|
| type | `{plan.target}` |
| experts | {moe.experts} (E {moe.expansion} x G {moe.granularity}), {moe.top_k} active, {moe.shared_experts} shared |
| router | {moe.router_order}, `init.router_std={plan.router_std:g}`, `moe.groups={moe.groups}` |
| initialization | {plan.init.name}, scaling {plan.init.scaling} |{latent}
| MoE layers | {len(moe.layers)} |
| parameters | {cost["parameters"]:,}, {active} (dense {cost["dense_parameters"]:,}) |
| matmul FLOPs per token | {cost["flops_per_token"]:,} (dense {cost["dense_flops_per_token"]:,}) |{zeros}

## Step 0

{step_0}
{notes}

`equivalence.json`, once `upcycle verify` has run, holds the measurement.

{_use(model.head, attributes_of(model.config), plan.target)}
{_listed(remarks)}
{_engines(plan.serving)}

Initialised, not trained: train it before use. `upcycle_manifest.json` says where each tensor comes from. The licence
of the source model applies.
"""


def _engines(served: Sequence[Serving]) -> str:
    lines = "\n".join(f"- {each}" for each in served)
    return f"Other engines, as measured with small models in float32 on a CPU:\n\n{lines}"


def trained_card(
    manifest: Mapping[str, Any],
    *,
    model_type: str,
    head: Head,
    attributes: Sequence[str],
    parameters: int,
    zeros: int,
    served: Sequence[Serving],
    remarks: Sequence[str],
) -> str:
    """README.md of an exported run, in the Hub's format.

    Args:
        manifest: the checkpoint's, with its training record.
        model_type: of transformers.
        head: the model's.
        attributes: what a reward head scores.
        parameters: of the model, as it was trained.
        zeros: parameters beside these, for other engines.
        served: what other engines do with a MoE; empty for a dense model.
        remarks: what a user of the tokenizer should know.
    """
    training = manifest["training"]
    config, summary = training["config"], training["summary"]
    start = {
        "scratch": "random weights",
        "dense": f"`{config['source']}`",
        "checkpoint": f"`{config['source']}`",
        "upcycle": f"`{config['source']}`, upcycled with {config['init']['name']}, scaling {config['init']['scaling']}",
    }[config["model"]]
    results = "\n".join(f"| {name} | {value:,.6g} |" for name, value in summary.items())
    schedule, batch = config["schedule"], config["batch"]
    engines = f"\n{_engines(served)}\n" if served else ""
    return f"""---
library_name: transformers
pipeline_tag: {PIPELINES[head.name]}
tags: [upcycling, {model_type}]
---

# {model_type}, trained from {start}

| | |
|---|---|
| parameters | {parameters:,}{f", and {zeros:,} zeros for other engines" if zeros else ""} |
| data | {config["data"]["name"]}, hash `{training["data_hash"]}` |
| steps | {training["step"]:,} of {batch["sequences"]} sequences of {config["sequence_length"]} tokens |
| learning rate | {schedule["name"]}, peak {schedule["peak"]:g} |
| seed | {config["seed"]} |
{results}

{_use(head, attributes, model_type)}
{_listed(remarks)}{engines}
Trained by `upcycle train`; `upcycle_manifest.json` holds every option. The licences of source model and data apply.
"""


def _use(head: Head, attributes: Sequence[str], model_type: str) -> str:
    remote = ", trust_remote_code=True" if model_type == "upcycled_moe" else ""
    torch, scores, after = "", "", ""
    if head is REWARD:
        torch = "import torch\n"
        scores = """
ids = [*tokenizer("A TEXT", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
scores = model(torch.tensor([ids])).logits[0]"""
        after = f"""

The scores are, in this order: {", ".join(attributes)}. Where config.json has `{OFFSETS}`, they are added to them."""
    return f"""## Use

```python
{torch}from transformers import {head.auto}, AutoTokenizer

model = {head.auto}.from_pretrained("THIS_DIRECTORY"{remote})
tokenizer = AutoTokenizer.from_pretrained("THIS_DIRECTORY"){scores}
```{after}"""


def _listed(remarks: Sequence[str]) -> str:
    return "".join(["\n", *(f"- {line}\n" for line in remarks)] if remarks else [])
