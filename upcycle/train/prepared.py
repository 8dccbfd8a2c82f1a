"""A run that is ready: all that was built and checked before its first step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from upcycle.distributed.shards import LAST
from upcycle.tracking.record import CHECKPOINTS

if TYPE_CHECKING:
    from pathlib import Path

    from upcycle.distributed.ranks import Ranks
    from upcycle.tracking.record import Record
    from upcycle.train.config import TrainConfig
    from upcycle.train.module import TrainingModule
    from upcycle.train.objectives.objective import Samples
    from upcycle.train.start import Start


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run that is ready to start, or to go on.

    Attributes:
        config: the options.
        start: the model and what belongs to it.
        corpus: what it trains on.
        record: the run's directory.
        module: what Lightning trains.
        kernel: name of the expert kernel; None for a dense model.
        steps: optimizer steps of the budget.
        flops_per_step: training FLOPs of one of them.
        resumed: optimizer steps of an earlier run of the same options.
        ranks: the processes that train together.
        shares: of each of them, once its model is there, `bytes_read` of the source's weights where that was counted,
            and `peak_memory`, the most bytes that the process has held.
    """

    config: TrainConfig
    start: Start
    corpus: Samples
    record: Record
    module: TrainingModule
    kernel: str | None
    steps: int
    flops_per_step: int
    resumed: int
    ranks: Ranks
    shares: tuple[dict[str, int | None], ...]

    @property
    def last_checkpoint(self) -> Path:
        return self.record.directory / CHECKPOINTS / LAST
