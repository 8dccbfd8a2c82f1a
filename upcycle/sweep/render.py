"""A sweep for people: what it will run and cost, and how its runs ended."""

from __future__ import annotations

import textwrap
from collections import defaultdict
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from upcycle.convert.render import duration
from upcycle.tracking.status import FINISHED, NOT_STARTED

if TYPE_CHECKING:
    from collections.abc import Sequence

    from upcycle.sweep.plan import SweepPlan
    from upcycle.sweep.run import Ending


def plan_table(plan: SweepPlan, *, free: int) -> RenderableType:
    """Question, arms with what one run of each takes, totals, and what is in the way.

    Args:
        plan: the sweep.
        free: bytes free where the output goes.
    """
    sweep = plan.sweep
    questions = Table(box=None, show_header=False, title=f"sweep {plan.name}", title_justify="left")
    for label in ("question", "hypothesis", "published"):
        questions.add_row(label, " ".join(getattr(sweep, label).split()))
    arms = Table(box=box.SIMPLE)
    arms.add_column("arm", overflow="fold", min_width=13)
    for column in ("model", "M parameters", "steps", "M tokens", "FLOPs", "time"):
        arms.add_column(column, justify="left" if column == "model" else "right")
    for name, each in plan.estimates.items():
        time = duration(each.flops / sweep.flops_per_second)
        counts = (f"{each.parameters / 1e6:,.2f}", f"{each.steps:,}", f"{each.tokens / 1e6:,.3g}", f"{each.flops:.3g}")
        arms.add_row(name, each.model, *counts, time)
    return Group(questions, arms, *(Text(line) for line in _totals(plan, free)))


def _totals(plan: SweepPlan, free: int) -> list[str]:
    left = plan.left
    seeds, finished = ", ".join(map(str, plan.seeds)), len(plan.jobs) - len(left)
    flops = f"{plan.flops(left):.3g}" + (f" of {plan.flops(plan.jobs):.3g}" if finished else "")
    needed = plan.disk(left)
    lines = [
        f"{len(plan.jobs)} runs ({len(plan.arms)} arms, seeds {seeds}), {finished} finished",
        f"left: {flops} FLOPs, {duration(plan.seconds(left))} one after the other at "
        f"{plan.sweep.flops_per_second:.3g} FLOP/s",
        f"left: {needed / 1e9:.2f} GB of checkpoints, {free / 1e9:.1f} GB free",
    ]
    return [*lines, "conflict: too little space for the checkpoints"] if needed > free else lines


def endings_table(plan: SweepPlan, ended: Sequence[Ending]) -> Table:
    """The sweep's metric by arm and seed."""
    table = Table(box=box.SIMPLE, title=f"{plan.name}: {plan.sweep.metric}", title_justify="left")
    table.add_column("arm", overflow="fold")
    for seed in plan.seeds:
        table.add_column(f"seed {seed}", justify="right")
    cells = defaultdict[str, list[str]](list)
    for each in ended:
        cells[each.job.arm].append(str(each.status) if each.value is None else f"{each.value:.4f}")
    for arm in plan.arms:
        table.add_row(arm.name, *cells[arm.name])
    return table


def unfinished(ended: Sequence[Ending]) -> str:
    """The runs that did not finish, each with the last lines of what it printed; empty if all did."""
    left = [each for each in ended if each.status != FINISHED]
    if not left:
        return ""
    parts = [f"{len(left)} of {len(ended)} runs did not finish; the same command goes on with them:"]
    for each in left:
        parts.append(f"{each.job.arm}, seed {each.job.seed} ({each.status or NOT_STARTED}): {each.job.directory}")
        parts += [textwrap.indent(line, "  ") for line in each.error]
    return "\n".join(parts)
