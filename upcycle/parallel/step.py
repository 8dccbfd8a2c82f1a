"""A training step of a model in a layout: what of it falls to one GPU. Knows no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from upcycle.parallel.sizes import outside, weights

if TYPE_CHECKING:
    from collections.abc import Iterator

    from upcycle.parallel.config import WorkloadConfig
    from upcycle.parallel.folding import Folding
    from upcycle.parallel.sizes import ModelSizes, Part, Weight


@dataclass(frozen=True, kw_only=True)
class Step:
    """A model, its layout, and what a step does."""

    sizes: ModelSizes
    layout: Folding
    workload: WorkloadConfig

    @property
    def micro_batches(self) -> int:
        """Micro-batches that a rank runs."""
        return self.workload.sequences // (self.layout.dp * self.workload.micro)

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch, over the ranks of CP; those of TP share them, or split them further."""
        return self.workload.micro * self.workload.sequence_length // self.layout.cp

    def count(self, part: Part) -> int:
        """How many layers have a part, of the stage that has most layers with experts."""
        layers, experts = self.sizes.layers // self.layout.pp, math.ceil(self.sizes.moe_layers / self.layout.pp)
        if part == "moe":
            return experts
        if part == "dense" and not self.sizes.separate:
            return layers - experts
        return math.ceil(self.sizes.count(part) / self.layout.pp)

    @property
    def chunks(self) -> int:
        """Model chunks of a stage: one per layer, where an interleaved schedule is possible (arXiv 2104.04473)."""
        interleaved = self.layout.pp > 1 and self.micro_batches % self.layout.pp == 0
        return self.sizes.layers // self.layout.pp if interleaved else 1

    def stage_weights(self) -> Iterator[tuple[Weight, int]]:
        """The weights of an outer stage of the pipeline, and how often it has them."""
        for part in self.sizes.parts:
            for weight in weights(self.sizes, part):
                yield weight, self.count(part)
        for weight in outside(self.sizes):
            yield weight, 1
            if self.layout.pp > 1:
                return  # the embedding, or the head, which is as large
