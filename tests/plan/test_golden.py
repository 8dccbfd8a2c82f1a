"""The whole plan of one model of each family, as JSON under tests/golden, so that every change of a plan is seen.

After a change that is meant, run `UPDATE_GOLDEN=1 pytest tests/plan/test_golden.py` and read the difference in git.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import models
import pytest
from conversions import options
from transformers import AutoConfig

from upcycle.convert.prepare import prepare
from upcycle.convert.render import plan_json

GOLDEN = Path(__file__).parents[1] / "golden"
SHARED = ("llama", "gemma", "gpt2")  # planned with a shared expert and in one layer only

OWN_ORDER = ("nemotron_h",)  # planned as the family's own mixture


def plan_of(name, source):
    """The plan without what depends on the machine or on transformers' version: disk, effort, paths, the dense config.

    Nor the fingerprint, which hashes the config; tests/arch/test_targets.py shows that the dense config is kept whole.
    """
    changes = {"shared_experts": 1, "layers": [1]} if name in SHARED else {}
    changes |= {"router_order": "auto"} if name in OWN_ORDER else {}
    plan = plan_json(prepare(options(source, "output", **changes), execute=False))
    del plan["disk_free"], plan["effort"], plan["fingerprint"], plan["source"]["given"]
    plan["config"].pop("text_config", None)
    if name in OWN_ORDER:
        before = AutoConfig.from_pretrained(source).to_dict()
        plan["config"] = {field: value for field, value in plan["config"].items() if before.get(field) != value}
    return json.loads(json.dumps(plan))


@pytest.mark.parametrize("name", models.ONE_PER_FAMILY)
def test_plan_is_the_golden_one(name, dense):
    family = models.MODELS[name]["model_type"]
    file = GOLDEN / f"plan_{family}.json"
    found = plan_of(name, dense(name))
    if os.environ.get("UPDATE_GOLDEN"):
        file.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    assert found == json.loads(file.read_text()), "if this is meant: UPDATE_GOLDEN=1 pytest tests/plan/test_golden.py"


def test_no_golden_plan_is_left_over():
    assert {file.stem for file in GOLDEN.iterdir()} == {f"plan_{m['model_type']}" for m in models.MODELS.values()}
