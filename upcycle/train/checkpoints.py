"""Checkpoints of a run: written whole or not at all, regularly and on the way out of a signal.

One process writes them in the background, several as shards (`distributed/strategy.py`).
"""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

from upcycle.distributed.shards import BEST, LAST, going_on, other, read_rest, read_sharded, reading
from upcycle.errors import ConfigError, OutputError, SourceError
from upcycle.files.durable import replacing, write_all

if TYPE_CHECKING:
    from types import FrameType

    from lightning.pytorch import LightningModule, Trainer

    from upcycle.distributed.ranks import Ranks

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class _Writer:
    """What `torch.save` writes to: a descriptor whose failures are the output's."""

    def __init__(self, descriptor: int, path: Path) -> None:
        self._descriptor, self._path = descriptor, path
        self.error: OutputError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        try:
            write_all(self._descriptor, view, self._path)
        except OutputError as error:
            self.error = error
            raise
        return len(view)

    def flush(self) -> None:
        """Nothing is buffered."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """A checkpoint's name holds the old one, or the new one, whatever interrupts the writing."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write, sync, rename.

        Raises:
            OutputError: the file cannot be written, such as on a full disk; the old one is intact.
        """
        with replacing(Path(path)) as descriptor:
            writer = _Writer(descriptor, Path(path))
            try:
                torch.save(checkpoint, writer)  # type: ignore[arg-type]
            except Exception:
                if writer.error:  # torch's own writer covers it with a RuntimeError
                    raise writer.error from None
                raise


def checkpoint_io() -> AsyncCheckpointIO:
    """Writes in a background thread from a copy of the state; a failure is raised at the next save, or at the end."""
    return AsyncCheckpointIO(AtomicCheckpointIO())


def exported_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint to export, as `read_checkpoint`.

    Raises:
        SourceError: it is missing or damaged.
    """
    if not path.exists() and not path.is_symlink():
        raise SourceError("there is no such checkpoint", found=path, remedy=other(path))
    with reading(path, other(path)):
        return read_checkpoint(path)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU; tensors are read from the file when they are used.

    Of a sharded one, the model and the metadata, read whole.

    Raises:
        Exception: whatever torch's parsers raise for one that is damaged.
    """
    if path.is_dir():
        return read_sharded(path)
    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return content


def steps_done(path: Path, ranks: Ranks) -> int:
    """Optimizer steps of the run that a checkpoint is of; 0 if there is none.

    Raises:
        SourceError: it is damaged, or its shards are gone.
        ConfigError: one process is to go on from shards, or several from one file.
    """
    if not path.exists() and not path.is_symlink():
        return 0
    if path.exists() and path.is_dir() != (ranks.size > 1):
        raise ConfigError(
            "the run was started by one process, and several are to go on"
            if path.is_file()
            else "the run was started by several processes, and one is to go on",
            found=f"{path} is a {'file' if path.is_file() else 'directory of shards'}, parallel is {ranks.layout}",
            remedy="start it as before: any number of ranks above one can go on with the shards of any other",
        )
    with reading(path, going_on(path)):
        return int((read_rest(path) if path.is_dir() else read_checkpoint(path))["global_step"])


class Checkpoints(Callback):
    """Saves last.ckpt every so many optimizer steps, on a signal and at the end; best.ckpt at the lowest loss.

    It saves at the start of the next batch, when everything that belongs to a step, validation too, is over.

    Args:
        directory: where they go.
        ranks: the processes that train together; a signal to one is for all.
        every: optimizer steps between them.
    """

    def __init__(self, directory: Path, ranks: Ranks, *, every: int) -> None:
        self.best = float("inf")
        self.signalled: signal.Signals | None = None
        self._directory, self._ranks, self._every = directory, ranks, every
        self._saved = -1
        self._improved = False
        self._before: dict[int, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved = trainer.global_step
        self._before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}

    def improve(self, loss: float) -> None:
        """Take note of a validation loss."""
        if loss < self.best:
            self.best, self._improved = loss, True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Save what is due; after a signal, stop."""
        step = trainer.global_step
        if batch_idx % trainer.accumulate_grad_batches:
            return
        stopping = self._ranks.any(self.signalled is not None, trainer.strategy.root_device)
        due = step > self._saved and (step % self._every == 0 or stopping)
        self._save(trainer, last=due)
        trainer.should_stop = trainer.should_stop or stopping

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer, last=trainer.global_step > self._saved)
        self._restore_handlers()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore_handlers()

    def _save(self, trainer: Trainer, *, last: bool) -> None:
        if self._improved:
            trainer.save_checkpoint(self._directory / BEST)
            self._improved = False
        if last:
            trainer.save_checkpoint(self._directory / LAST)
            self._saved = trainer.global_step

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self.signalled = signal.Signals(number)

    def _restore_handlers(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
