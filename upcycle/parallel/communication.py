"""What a GPU sends in a training step, by kind, and to whom. Knows no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from upcycle.parallel.gpu import Group
from upcycle.parallel.memory import BF16, FP32

if TYPE_CHECKING:
    from collections.abc import Iterator

    from upcycle.parallel.step import Step

Kind = Literal["all-to-all", "all-gather", "reduce-scatter", "pipeline"]
Behind = Literal["nothing", "micro_batch", "step"]
KINDS: tuple[Kind, ...] = ("all-to-all", "all-gather", "reduce-scatter", "pipeline")


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Communication of one kind for one purpose; an all-reduce is a reduce-scatter and an all-gather.

    Attributes:
        kind: of collective.
        purpose: what is sent.
        nbytes: that a GPU sends in a step.
        group: between whom.
        behind: compute that hides it: none, that of one micro-batch, or that of all of the step.
    """

    kind: Kind
    purpose: str
    nbytes: float
    group: Group
    behind: Behind = "nothing"


def communication(step: Step) -> list[Traffic]:
    """Everything that a GPU sends in a step."""
    found = [*_experts(step), *_tensor(step), *_context(step), *_pipeline(step), *_states(step)]
    return [traffic for traffic in found if traffic.nbytes]


def _both(
    gathered: str,
    gathered_bytes: float,
    scattered: str,
    scattered_bytes: float,
    group: Group,
    behind: Behind = "nothing",
) -> list[Traffic]:
    return [
        Traffic(kind="all-gather", purpose=gathered, nbytes=gathered_bytes, group=group, behind=behind),
        Traffic(kind="reduce-scatter", purpose=scattered, nbytes=scattered_bytes, group=group, behind=behind),
    ]


def _experts(step: Step) -> Iterator[Traffic]:
    """Tokens to their experts and back (arXiv 2504.14960, section 3.3), and again for the gradients."""
    layout, passes = step.layout, 3 if step.workload.activation_checkpointing else 2
    copies = step.tokens / layout.tp * step.sizes.top_k * step.sizes.expert_size * BF16
    once = step.micro_batches * step.count("moe") * copies
    yield Traffic(
        kind="all-to-all",
        purpose="tokens to experts and back",
        nbytes=2 * passes * once * (layout.ep - 1) / layout.ep,
        group=Group(size=layout.ep, stride=layout.etp),
    )
    volume = passes * once * (layout.etp - 1)
    yield from _both("tokens within ETP", volume, "outputs within ETP", volume, Group(size=layout.etp))


def _tensor(step: Step) -> Iterator[Traffic]:
    """Around what TP splits (arXiv 2205.05198, section 4.2.2); without sequence parallelism in transformers."""
    sizes, layout = step.sizes, step.layout
    again = 1 if step.workload.activation_checkpointing else 0
    blocks = step.count("attention") + step.count("mamba2") + step.count("dense")
    if layout.engine == "megatron":
        blocks += step.count("moe") if sizes.shared_width else 0
        # The input is gathered once more for the gradient of the weights.
        gathers, scatters = (3 + again) * blocks, (2 + again) * blocks
    else:
        # One all-reduce either way; the ranks of TP split the tokens of the experts, and gather what comes back.
        scatters = (2 + again) * blocks
        gathers = scatters + (2 + again) * step.count("moe")
    once = step.micro_batches * step.tokens / layout.tp * (layout.tp - 1) * sizes.hidden * BF16
    purpose = "activations within TP"
    yield from _both(purpose, gathers * once, purpose, scatters * once, Group(size=layout.tp))


def _context(step: Step) -> Iterator[Traffic]:
    """Keys and values around the ring, again in the backward pass, and their gradients (arXiv 2310.01889)."""
    sizes, layout = step.sizes, step.layout
    layers, passes = step.count("attention"), 3 if step.workload.activation_checkpointing else 2
    pairs = 2 * sizes.kv_heads * sizes.head_size / layout.tp * BF16
    once = step.micro_batches * layers * step.tokens * pairs * (layout.cp - 1)
    group = Group(size=layout.cp, stride=layout.tp)
    yield from _both("keys and values", passes * once, "gradients of keys and values", once, group, "step")


def _pipeline(step: Step) -> Iterator[Traffic]:
    """Activations to the next stage and gradients back, from every chunk (arXiv 2104.04473)."""
    layout = step.layout
    if layout.pp > 1:
        sent = 2 * step.micro_batches * step.chunks * step.tokens / layout.token_ways * step.sizes.hidden * BF16
        group = Group(size=layout.pp, stride=layout.world // layout.pp)
        behind: Behind = "step" if step.chunks > 1 else "nothing"
        yield Traffic(kind="pipeline", purpose="activations between stages", nbytes=sent, group=group, behind=behind)


def _states(step: Step) -> Iterator[Traffic]:
    """Weights and gradients, between the ranks that shard the states: float32, but Megatron's weights bfloat16."""
    layout = step.layout
    for of, experts, group in (("expert", True, layout.expert_shards), ("other", False, layout.shards)):
        weights = [each for each in step.stage_weights() if (each[0].kind == "expert") == experts]
        whole = sum(count * math.prod(layout.split(weight)) for weight, count in weights)
        share = whole * (group.size - 1) / group.size
        names = f"{of} weights", f"{of} gradients"
        if layout.engine == "megatron":
            yield from _both(names[0], BF16 * share, names[1], FP32 * share, group, "micro_batch")
        else:
            every = step.micro_batches  # and gathered for its forward and its backward pass
            yield from _both(names[0], 2 * every * FP32 * share, names[1], every * FP32 * share, group, "step")
            replicas, summed = layout.replicas, f"{names[1]}, replicas"
            reduced = every * FP32 * whole / group.size * (replicas.size - 1) / replicas.size
            yield from _both(summed, reduced, summed, reduced, replicas, "step")
