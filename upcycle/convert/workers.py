"""Writes shards in this process or in several. None depends on another: a value follows from seed and name alone."""

from __future__ import annotations

import logging
import multiprocessing
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection, resource_tracker
from typing import TYPE_CHECKING

from upcycle.checkpoint import StagedFiles, TensorSpec, open_reader, torch_dtype
from upcycle.convert.interruption import uninterrupted
from upcycle.convert.materialise import Materialiser
from upcycle.convert.threads import one_thread
from upcycle.errors import OutputError, UpcycleError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from multiprocessing.connection import Connection
    from multiprocessing.context import SpawnProcess
    from pathlib import Path

    from torch import Tensor

    from upcycle.checkpoint import Shard
    from upcycle.plan.tensors import TargetTensor

OnBytes = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class ShardWork:
    """What the shards of a conversion are made from; a process can be sent it.

    Attributes:
        source: the dense checkpoint.
        stored: name of a source tensor -> its name in the checkpoint.
        tensors: what to make, by name.
        seed: seed of everything random.
        bases: computed matrices by name, which processes share.
        staged: where to write.
    """

    source: Path
    stored: Mapping[str, str]
    tensors: Mapping[str, TargetTensor]
    seed: int
    bases: Mapping[str, Tensor]
    staged: StagedFiles

    def write(self, shards: Sequence[Shard], read: Callable[[str], Tensor], on_bytes: OnBytes) -> None:
        """Write shards one after the other.

        Args:
            shards: the shards.
            read: returns a source tensor by name.
            on_bytes: called with the number of bytes just handed on to be written.

        Raises:
            SourceError: the source cannot be read, or holds NaN or infinity.
            OutputError: a shard cannot be written.
        """
        materialiser = Materialiser(read, self.seed, self.bases)

        def chunks(spec: TensorSpec) -> Iterator[Tensor]:
            return materialiser.blocks(self.tensors[spec.name], torch_dtype(spec.dtype))

        with one_thread():
            for shard in shards:
                self.staged.write_shard(shard, chunks, on_bytes)


def write_in_processes(work: ShardWork, shards: Sequence[Shard], processes: int, on_bytes: OnBytes) -> None:
    """Deal shards out to new processes, which end when this one ends, however that happens.

    Args:
        work: what the shards are made from.
        shards: at least as many as processes.
        processes: how many.
        on_bytes: called with the number of bytes just handed on to be written by any of them.

    Raises:
        SourceError, OutputError: what a process met; or one was killed. The others are then killed too.
    """
    running: dict[Connection, SpawnProcess] = {}
    try:
        resource_tracker.ensure_running()  # or the first process would start it, which unblocks the signal
        with uninterrupted():
            for share in (shards[first::processes] for first in range(processes)):
                receiver, process = _start(work, share)
                running[receiver] = process
        _listen(dict(running), on_bytes)
    finally:
        for process in running.values():
            process.kill()
            process.join()


def _start(work: ShardWork, share: Sequence[Shard]) -> tuple[Connection, SpawnProcess]:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    with sender:
        process = context.Process(target=_work, args=(work, share, sender))
        process.start()
    return receiver, process


def _work(work: ShardWork, share: Sequence[Shard], sender: Connection) -> None:
    """The life of a process: it sends how many bytes it wrote, as they come, and the error that ends it, if any."""
    logging.getLogger("upcycle").setLevel(logging.ERROR)  # its parent has opened the source too, and said what there is
    with suppress(BrokenPipeError):  # the parent is no more
        try:
            reader = open_reader(work.source)
            work.write(share, lambda name: reader.read(work.stored[name]), sender.send)
        except (UpcycleError, OSError) as error:
            sender.send(error)


def _listen(running: dict[Connection, SpawnProcess], on_bytes: OnBytes) -> None:
    """Hear from processes until all have ended well."""
    while running:
        ready = connection.wait(running)
        for receiver in [each for each in running if each in ready]:
            try:
                message = receiver.recv()
            except (EOFError, OSError):
                process = running.pop(receiver)
                process.join()
                if process.exitcode:
                    raise _lost(process.exitcode) from None
                continue
            if isinstance(message, Exception):
                raise message
            on_bytes(message)


def _lost(code: int) -> OutputError:
    return OutputError(
        "a process that wrote files ended before its work",
        found=f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}",
        remedy="if memory ran out, use fewer workers (upcycle plan says what they need)",
    )
