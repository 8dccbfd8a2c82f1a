"""The panels that matter for a MoE. The W&B workspace and the report are both made from `SECTIONS`.

Knows the schema of the metrics alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from upcycle.tracking import schema

STEP, TOKENS, FLOPS = "step", "train/tokens", "train/flops"
# What is drawn against, in words.
_AXES = {STEP: "optimizer step", TOKENS: "tokens trained on", FLOPS: "training FLOPs"}


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A chart of one metric over the run.

    Attributes:
        title: a few words.
        metric: name in the schema; one with `{layer}` stands for that metric of every MoE layer.
        against: what is on the x axis: `step`, or a metric that only grows.
        kind: `lines` has a line per arm; `heat map` is for metrics with a value per expert, and shows one run.
    """

    title: str
    metric: str
    against: str = TOKENS
    kind: Literal["lines", "heat map"] = "lines"

    @property
    def unit(self) -> str:
        return "" if self._known.unit == "1" else self._known.unit

    @property
    def meaning(self) -> str:
        return self._known.meaning

    @property
    def x_title(self) -> str:
        return _AXES[self.against]

    @property
    def _known(self) -> schema.Metric:
        return next(each for each in schema.METRICS if each.name == self.metric)

    def of_layer(self, layer: int) -> str:
        """The metric's name in the record, for one layer."""
        return self.metric.replace("{layer}", str(layer))


@dataclass(frozen=True, kw_only=True)
class Section:
    """Panels about one thing.

    Attributes:
        title: of the section.
        panels: its panels.
    """

    title: str
    panels: tuple[Panel, ...]


SECTIONS = (
    Section(
        title="Loss",
        panels=(
            Panel(title="Held-out loss against tokens", metric="val/loss"),
            Panel(title="Held-out loss against FLOPs", metric="val/loss", against=FLOPS),
            Panel(title="Training loss", metric="train/loss"),
        ),
    ),
    Section(
        title="Scores of attributes",
        panels=(
            Panel(title="Held-out squared error", metric="val/mse"),
            Panel(title="Training squared error", metric="train/mse"),
        ),
    ),
    Section(
        title="Expert load",
        panels=(
            Panel(title="Load of each expert", metric="moe/layer_{layer}/load", against=STEP, kind="heat map"),
            Panel(title="MaxVio", metric="moe/max_vio"),
            Panel(title="Load entropy", metric="moe/load_entropy"),
            Panel(title="Dead experts", metric="moe/dead_experts"),
            Panel(title="Dropped share", metric="moe/dropped_share"),
        ),
    ),
    Section(
        title="Routers and experts",
        panels=(
            Panel(title="Tokens with whole FFNs", metric="moe/whole_ffns"),
            Panel(title="Router entropy", metric="moe/router_entropy"),
            Panel(title="Cosine of experts to dense", metric="moe/dense_cosine"),
            Panel(title="Cosine within groups", metric="moe/group_cosine"),
        ),
    ),
    Section(
        title="Optimization",
        panels=(
            Panel(title="Learning rate", metric="train/learning_rate"),
            Panel(title="Gradient norm", metric="train/grad_norm"),
        ),
    ),
    Section(
        title="Speed",
        panels=(
            Panel(title="Throughput", metric="train/tokens_per_second"),
            Panel(title="Step time", metric="train/step_seconds"),
        ),
    ),
)
