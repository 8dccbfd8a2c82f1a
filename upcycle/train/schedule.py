"""The learning rate as a function of the step, and the budget in steps."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from upcycle.errors import ConfigError

if TYPE_CHECKING:
    from upcycle.train.config import BudgetConfig, ScheduleConfig


def budget_steps(budget: BudgetConfig, *, tokens_per_step: int, flops_per_step: int) -> int:
    """Optimizer steps nearest to the budget.

    Args:
        budget: exactly one of steps, tokens, flops.
        tokens_per_step: tokens of one optimizer step.
        flops_per_step: training FLOPs of one optimizer step.

    Raises:
        ConfigError: none or several are given, or the budget is under half a step.
    """
    given = {
        name: value
        for name, value in (("steps", budget.steps), ("tokens", budget.tokens), ("flops", budget.flops))
        if value is not None
    }
    if len(given) != 1:
        raise ConfigError(
            "a budget needs exactly one unit",
            found=", ".join(f"budget.{name}" for name in given) or "none",
            expected="budget.steps, budget.tokens or budget.flops",
        )
    ((name, value),) = given.items()
    steps = round(value / {"steps": 1, "tokens": tokens_per_step, "flops": flops_per_step}[name])
    if steps < 1:
        per_step = {"steps": 1, "tokens": tokens_per_step, "flops": flops_per_step}[name]
        raise ConfigError(f"budget.{name} is less than one step", found=f"{value:g}", expected=f"at least {per_step:g}")
    return steps


def check_schedule(schedule: ScheduleConfig, *, steps: int) -> None:
    """Check the fields against each other and the budget.

    Raises:
        ConfigError: naming the field.
    """
    checks = [
        ("peak", schedule.peak, schedule.peak > 0, "above 0"),
        ("final", schedule.final, 0 <= schedule.final <= schedule.peak, "0 to schedule.peak"),
        ("warmup", schedule.warmup, 0 <= in_steps(schedule.warmup, steps) <= steps, f"at most the {steps} steps"),
        ("decay", schedule.decay, 0 <= in_steps(schedule.decay, steps) <= steps, f"at most the {steps} steps"),
        ("steps", schedule.steps, schedule.steps is None or schedule.steps > 0, "above 0"),
        ("tokens", schedule.tokens, schedule.tokens is None or schedule.tokens > 0, "above 0"),
    ]
    for name, value, right, expected in checks:
        if not right:
            raise ConfigError(f"schedule.{name} is out of range", found=value, expected=expected)
    if schedule.steps is not None and schedule.tokens is not None:
        raise ConfigError("schedule has two lengths", found="steps and tokens", expected="one of them")


def learning_rate(schedule: ScheduleConfig, step: int, *, steps: int, tokens_per_step: int) -> float:
    """Learning rate of an optimizer step.

    Cosine: SGDR without restarts (arXiv 1608.03983). Warm-up, stable, decay: MiniCPM (arXiv 2404.06395), here with a
    linear decay. Reset: the cosine of upcycling (arXiv 2410.07524), over a length of its own.

    Args:
        schedule: the schedule.
        step: 0 for the first step.
        steps: of the whole budget.
        tokens_per_step: tokens of one optimizer step.
    """
    warmup = in_steps(schedule.warmup, steps)
    if step < warmup:
        return schedule.peak * (step + 1) / warmup
    match schedule.name:
        case "constant":
            return schedule.peak
        case "wsd":
            decay = in_steps(schedule.decay, steps)
            left = min(1.0, (steps - step) / decay) if decay else 1.0
            return schedule.final + (schedule.peak - schedule.final) * left
    length = cosine_steps(schedule, steps=steps, tokens_per_step=tokens_per_step)
    progress = min(1.0, (step - warmup) / max(1, length - warmup))
    return schedule.final + (schedule.peak - schedule.final) * (1 + math.cos(math.pi * progress)) / 2


def cosine_steps(schedule: ScheduleConfig, *, steps: int, tokens_per_step: int) -> int:
    """Steps from the start to the end of the cosine, the warm-up among them."""
    if schedule.name != "reset":
        return steps
    in_tokens = round(schedule.tokens / tokens_per_step) if schedule.tokens else None
    return schedule.steps or in_tokens or steps


def in_steps(value: float, steps: int) -> int:
    """A number of steps that is given as such, or below 1 as a share of the budget."""
    return round(value * steps if value < 1 else value)
