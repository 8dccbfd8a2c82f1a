"""Published hybrids counted from config.json alone: to the digit where their makers give digits."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from published_hybrids import BILLIONS, CONFIGS, EXACT

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from cli import Outcome

pytest_plugins = ["tiny"]


@pytest.fixture
def planned(upcycle: Callable[..., Outcome], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Returns what `upcycle plan` says of a config."""

    def plan(config: dict[str, Any], *arguments: str) -> dict[str, Any]:
        (tmp_path / "config.json").write_text(json.dumps(config))
        shown = upcycle("plan", f"source={tmp_path}", "format=json", *arguments)
        assert shown.status in (0, 1), shown.err  # 1: does not fit in memory
        return dict(json.loads(shown.out))

    return plan


def counted(plan: dict[str, Any]) -> tuple[int, int, int]:
    """Parameters, of them those for multi-token prediction, and active ones, of a mixture or of a dense source."""
    if "sizes" in plan:
        sizes = plan["sizes"]
        return sizes["parameters"], sizes["ahead_parameters"], sizes["active_parameters"]
    dense = plan["cost"]["dense_parameters"]
    return dense, 0, dense


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters(name: str, planned: Callable[..., dict[str, Any]]) -> None:
    plan = planned(CONFIGS[name], "moe.granularity=1", "moe.expansion=2", "moe.top_k=2")
    every, ahead, active = counted(plan)
    billions = BILLIONS[name]
    assert (every - ahead) / 1e9 == pytest.approx(billions[0], rel=2e-4)
    assert active / 1e9 == pytest.approx(billions[1], rel=2e-4)
    if name in EXACT:
        assert every == EXACT[name][0]
    if name in EXACT and "sizes" in plan:
        assert plan["sizes"]["tensors"] == EXACT[name][1]


def test_a_training_run_of_nano_is_planned_for_64_gpus(planned: Callable[..., dict[str, Any]]) -> None:
    plan = planned(CONFIGS["Nemotron-3-Nano-30B-A3B"], "parallel=ep", "nodes=8", "parallel.ep=16")
    assert plan["training"]["fits"]
    (layout,) = plan["training"]["layouts"]
    assert layout["layout"]["ep"] == 16
    assert 0.05 < layout["estimated"]["mfu"] < 0.5
    # 6 layers with 2 heads of keys and values of size 128, in bfloat16; 23 states of 64 x 64 x 128 in float32.
    assert plan["sizes"]["cache_bytes_per_token"] == 6 * 2 * 2 * 128 * 2
    assert plan["sizes"]["cache_bytes_per_sequence"] == 23 * (4 * 64 * 64 * 128 + 2 * 4 * (64 * 64 + 2 * 8 * 128))


@pytest.mark.parametrize(
    "mutant",
    [
        {"n_groups": 4},
        {"moe_latent_size": None},
        {"mtp_hybrid_override_pattern": "*"},
        {"moe_shared_expert_intermediate_size": 2688},
    ],
)
def test_a_wrong_size_is_noticed(mutant: dict[str, Any], planned: Callable[..., dict[str, Any]]) -> None:
    name = "Nemotron-3-Super-120B-A12B"
    assert counted(planned({**CONFIGS[name], **mutant}))[0] != EXACT[name][0]
