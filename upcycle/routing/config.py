"""Options of routing and of its balancing. Knows only the errors' and the options' conventions, and not torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from upcycle.options.config import STRICT


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A coefficient that goes linearly from `start` to `end` over `steps` optimizer steps, and then stays.

    Attributes:
        start, end: values at step 0 and from step `steps` on.
        steps: optimizer steps.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    start: float
    end: float
    steps: int


def coefficient(value: float | Schedule, step: int) -> float:
    """The value of a coefficient at optimizer step `step`, counted from 0."""
    if isinstance(value, Schedule):
        return value.start + (value.end - value.start) * min(step / value.steps, 1.0)
    return value


@dataclass(frozen=True, kw_only=True)
class Release:
    """When virtual groups need no longer hold.

    Attributes:
        until: share of the budget in which `moe.groups` holds, above 0 and below 1.
        then: free or positions, from then on.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    until: float
    then: str


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """`router.*`. What is None stays as the checkpoint says.

    Attributes:
        score: softmax or sigmoid.
        order: softmax_topk or topk_softmax, for score=softmax.
        renormalise: sigmoid: the kept weights are divided by their sum; True where the checkpoint was not sigmoid.
        scaling_factor: what the weights are multiplied by in the end (DeepSeek-V3's `routed_scaling_factor`).
        capacity_factor: training: an expert takes at most ceil(capacity_factor * tokens * K / N) tokens, the least
            probable ones are dropped; None drops nothing. With expert_choice, what an expert takes; None is 1 there.
        jitter: training: the router's input is multiplied by U(1 - jitter, 1 + jitter) (Switch, arXiv 2101.03961).
        noisy_top_k: training: noise of standard deviation 1/N on the logits (V-MoE, arXiv 2106.05974), the same for
            all experts of a virtual group.
        expert_choice: experts choose tokens instead (arXiv 2202.09368), in evaluation too. A token's experts then
            depend on later tokens, so such a model cannot generate.
        release: after which share of the budget experts are chosen in another way; None never.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    score: str | None = None
    order: str | None = None
    renormalise: bool | None = None
    scaling_factor: float | None = None
    capacity_factor: float | None = None
    jitter: float = 0.0
    noisy_top_k: bool = False
    expert_choice: bool = False
    release: Release | None = None


@dataclass(frozen=True, kw_only=True)
class BalanceConfig:
    """`balance.*`. A coefficient is a number or a `Schedule`.

    Attributes:
        aux_loss: coefficient of Switch's load-balancing loss, which is 1 when experts are equally loaded, whatever K.
        statistics: micro_batch, or global_batch: loads for aux_loss over all ranks and all micro-batches so far in the
            optimizer step (arXiv 2501.11873).
        z_loss: coefficient of the mean square of the logits' logsumexp (ST-MoE, arXiv 2202.08906).
        bias_update: by how much the bias for choosing moves after every optimizer step, up for experts loaded below
            the mean and down for those above (arXiv 2408.15664).
        bias_per: group (the experts of a virtual group move as one while groups are chosen as wholes) or expert, which
            takes groups apart in a type whose routers take the top-k of all experts.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    aux_loss: float | Schedule = 0.0
    statistics: str = "micro_batch"
    z_loss: float | Schedule = 0.0
    bias_update: float | Schedule = 0.0
    bias_per: str = "group"
