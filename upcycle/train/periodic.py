"""What is measured before the first step, every so many steps, and after the last."""

from __future__ import annotations

import time
from abc import abstractmethod
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class Periodic(Callback):
    """Measures between optimizer steps, at the same steps whether or not the run was interrupted.

    Args:
        every: optimizer steps.

    Attributes:
        seconds: time that it took so far.
    """

    def __init__(self, *, every: int) -> None:
        self.seconds = 0.0
        self._every = every
        self._measured = -1

    @abstractmethod
    def measure(self, step: int, module: Any, trainer: Trainer) -> None:
        """Measure after `step` optimizer steps."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure before the first step; what a resumed run starts with was measured before."""
        self._measured = trainer.global_step
        if trainer.global_step == 0:
            self._measure(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        if trainer.global_step % self._every == 0 and trainer.global_step > self._measured:
            self._measure(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == trainer.max_steps and trainer.global_step > self._measured:
            self._measure(trainer, pl_module)

    def _measure(self, trainer: Trainer, module: LightningModule) -> None:
        start = time.perf_counter()
        self.measure(trainer.global_step, module, trainer)
        self._measured = trainer.global_step
        self.seconds += time.perf_counter() - start
