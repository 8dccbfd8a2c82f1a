"""The objectives by the name that the option `objective` has."""

from __future__ import annotations

from typing import TYPE_CHECKING

from upcycle.train.objectives import causal_lm, regression

if TYPE_CHECKING:
    from upcycle.train.config import TrainConfig
    from upcycle.train.objectives.objective import Kind

KINDS: dict[str, Kind] = {"causal_lm": causal_lm.KIND, "regression": regression.KIND}


def kind_of(config: TrainConfig) -> Kind:
    """The objective that the options name."""
    return KINDS[config.objective]
