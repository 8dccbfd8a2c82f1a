"""The same sweep for W&B: the config from which its agents run the arms, each a call of `upcycle train`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from upcycle.options.arguments import ARM, quoted

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from upcycle.sweep.plan import SweepPlan


def agent_config(
    plan: SweepPlan, *, output: Path, overrides: Sequence[str], flags: Sequence[str], project: str, entity: str | None
) -> dict[str, Any]:
    """What `wandb sweep` takes. A run goes to the directory that the sweep itself would give it.

    Args:
        plan: the sweep.
        output: directory of all runs.
        overrides: the sweep's command line.
        flags: what of it is for Hydra.
        project: where the runs go.
        entity: whose project it is; null is the account's default.
    """
    mirrored = "wandb.mode=online"  # first, so that the command line may say otherwise
    given = [each for each in overrides if not each.startswith("output=")]
    return {
        "name": plan.name,
        "description": plan.sweep.question,
        "project": project,
        **({"entity": entity} if entity else {}),
        "method": "grid",
        "metric": {"name": plan.sweep.metric, "goal": "minimize"},
        "parameters": {"seed": {"values": list(plan.seeds)}, ARM: {"values": [arm.name for arm in plan.arms]}},
        "command": [
            *("${env}", "upcycle", "train", *flags, mirrored, *given, f"output={quoted(str(output.resolve()))}"),
            "${args_override_hydra}",
        ],
    }
