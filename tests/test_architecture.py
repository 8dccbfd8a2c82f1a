"""Import directions of ARCHITECTURE.md, each in a fresh interpreter."""

from __future__ import annotations

import subprocess
import sys

import pytest

ROOMS = {
    "upcycle": ("torch", "transformers", "hydra", "upcycle.cli"),
    "upcycle.errors": ("torch", "transformers", "hydra", "upcycle.config"),
    "upcycle.config": ("torch", "transformers", "hydra", "upcycle.arch"),
    "upcycle.arch.families": ("torch", "transformers", "upcycle.plan", "upcycle.checkpoint", "upcycle.init"),
    "upcycle.arch.targets": ("torch", "transformers", "upcycle.plan", "upcycle.checkpoint", "upcycle.init"),
    "upcycle.plan.plan": ("torch", "transformers", "upcycle.checkpoint", "upcycle.init", "upcycle.source"),
    "upcycle.plan.cost": ("torch", "transformers", "upcycle.checkpoint", "upcycle.init", "upcycle.source"),
    "upcycle.init.experts": ("transformers", "upcycle.plan", "upcycle.arch", "upcycle.checkpoint"),
    "upcycle.checkpoint": ("transformers", "gguf", "upcycle.plan", "upcycle.arch", "upcycle.init"),
    "upcycle.files": ("torch", "transformers", "upcycle.checkpoint"),
    "upcycle.tracking.record": ("torch", "transformers", "upcycle.checkpoint", "upcycle.train"),
    "upcycle.analysis": ("torch", "transformers", "upcycle.checkpoint", "upcycle.train"),
    "upcycle.modeling": ("torch", "transformers"),
    "upcycle.materialise": ("transformers", "upcycle.checkpoint", "upcycle.source"),
    "upcycle.parallel.planning": ("torch", "transformers", "upcycle.checkpoint", "upcycle.source", "upcycle.train"),
    "upcycle.cli": ("torch", "transformers"),
}


@pytest.mark.parametrize("module", ROOMS)
def test_a_room_loads_only_what_it_may_know(module: str) -> None:
    code = f"import sys, {module}; print(*sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(ROOMS[module]) & set(ended.stdout.split())


@pytest.mark.parametrize("module", ["configuration_upcycled_moe", "modeling_upcycled_moe"])
def test_the_model_may_be_imported_first(module: str) -> None:
    code = f"import upcycle.modeling.{module}, transformers; print(transformers.AutoConfig.for_model)"
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
