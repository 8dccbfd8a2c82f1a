"""The model card of a converted checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from upcycle.plan.plan import Plan


def model_card(manifest: Mapping[str, Any], plan: Plan) -> str:
    """README.md in the Hub's format, from the manifest."""
    moe, cost = plan.moe, manifest["cost"]
    remote = ", trust_remote_code=True" if plan.target == "upcycled_moe" else ""
    step_0 = "\n".join(f"- {line}" for line in plan.losses) or "- equals the dense model up to rounding"
    notes = "\n".join(f"- {line}" for line in plan.notes)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [moe, upcycling, {plan.target}]
---

# {moe.name} mixture of experts, upcycled from `{manifest["source"]["given"]}`

| | |
|---|---|
| type | `{plan.target}` |
| experts | {moe.experts} (E {moe.expansion} x G {moe.granularity}), {moe.top_k} active, {moe.shared_experts} shared |
| router | {moe.router_order}, `init.router_std={plan.router_std:g}` |
| initialization | {plan.init.name}, scaling {plan.init.scaling} |
| MoE layers | {len(moe.layers)} |
| parameters | {cost["parameters"]:,}, {cost["active_parameters"]:,} active (dense {cost["dense_parameters"]:,}) |
| matmul FLOPs per token | {cost["flops_per_token"]:,} (dense {cost["dense_flops_per_token"]:,}) |

## Step 0

{step_0}
{notes}

`equivalence.json`, once `upcycle verify` has run, holds the measurement.

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("THIS_DIRECTORY"{remote})
tokenizer = AutoTokenizer.from_pretrained("THIS_DIRECTORY")
```

Initialised, not trained: train it before use. `upcycle_manifest.json` says where each tensor comes from. The licence
of the source model applies.
"""
