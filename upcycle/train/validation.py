"""What an objective measures on held-out samples."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from upcycle.train.periodic import Periodic

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from upcycle.distributed.ranks import Ranks
    from upcycle.tracking.record import Record
    from upcycle.train.checkpoints import Checkpoints
    from upcycle.train.objectives.objective import Objective

UNQUANTISED = "unquantised"  # of a criterion, where training is in low precision


class Validation(Periodic):
    """Measures held-out samples.

    Args:
        record: where the metrics go.
        ranks: the processes that train together; each measures its share.
        checkpoints: told of the objective's criterion, to keep the best.
        every: optimizer steps.
        batch_size: samples per forward pass.
        samples: per domain; None takes all.
    """

    def __init__(
        self,
        record: Record,
        ranks: Ranks,
        checkpoints: Checkpoints,
        *,
        every: int,
        batch_size: int,
        samples: int | None,
    ) -> None:
        super().__init__(every=every)
        self._record, self._ranks, self._checkpoints = record, ranks, checkpoints
        self._batch_size, self._samples = batch_size, samples

    def measure(self, step: int, module: Any, trainer: Trainer) -> None:
        objective: Objective = module.objective
        held_out = partial(
            objective.held_out, module.model, batch_size=self._batch_size, samples=self._samples, ranks=self._ranks
        )
        with trainer.precision_plugin.forward_context():
            row = held_out()
            if module.emulation:
                with module.emulation.off():
                    row[f"{objective.criterion}_{UNQUANTISED}"] = held_out()[objective.criterion]
        self._record.log(row, step=step)
        self._checkpoints.improve(row[objective.criterion])
