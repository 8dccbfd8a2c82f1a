"""A training step of a model in a layout: what of it falls to one GPU. Knows no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from upcycle.parallel.sizes import layer, outside

if TYPE_CHECKING:
    from collections.abc import Iterator

    from upcycle.parallel.config import WorkloadConfig
    from upcycle.parallel.folding import Folding
    from upcycle.parallel.sizes import ModelSizes, Weight


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

    @property
    def moe_layers(self) -> int:
        """Layers with experts of the stage that has most of them."""
        return math.ceil(self.sizes.moe_layers / self.layout.pp)

    @property
    def dense_layers(self) -> int:
        """The other layers of that stage."""
        return self.sizes.layers // self.layout.pp - self.moe_layers

    @property
    def chunks(self) -> int:
        """Model chunks of a stage: one per layer, where an interleaved schedule is possible (arXiv 2104.04473)."""
        interleaved = self.layout.pp > 1 and self.micro_batches % self.layout.pp == 0
        return self.sizes.layers // self.layout.pp if interleaved else 1

    def stage_weights(self) -> Iterator[tuple[Weight, int]]:
        """The weights of an outer stage of the pipeline, and how often it has them."""
        for weight in layer(self.sizes, moe=True):
            yield weight, self.moe_layers
        for weight in layer(self.sizes, moe=False):
            yield weight, self.dense_layers
        for weight in outside(self.sizes):
            yield weight, 1
            if self.layout.pp > 1:
                return  # the embedding, or the head, which is as large
