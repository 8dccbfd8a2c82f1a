"""The tasks of a job that train one run together: the first decides what all do. Knows submitit's numbering, and torch.

To its worker every task is what torchrun would be.
"""

from __future__ import annotations

import contextlib
import os
import time
from datetime import timedelta
from typing import TYPE_CHECKING

from upcycle.errors import TrainingError

if TYPE_CHECKING:
    import subprocess
    from types import TracebackType
    from typing import Self

    from submitit import JobEnvironment
    from torch._C._distributed_c10d import TCPStore

SUBMITTED = "SUBMITIT_EXECUTOR"
GATHERING = timedelta(minutes=5)  # srun starts the tasks at once; importing torch from a shared disk takes its time
GRACE = timedelta(seconds=60)  # for the others, when one has failed
PATIENCE = timedelta(days=365)  # the first may wait for another sweep's run; if it dies, so does the connection
PORTS = range(20_000, 32_000)  # below those that systems give to connections
POLL = 0.2  # seconds


def submitted() -> JobEnvironment | None:
    """The job that this process is a task of; None where submitit did not start it."""
    if SUBMITTED not in os.environ:
        return None
    from submitit import JobEnvironment

    return JobEnvironment()


class Team:
    """A task among those of a job. The first calls `start` for every attempt; the others `follow` until it is false.

    Args:
        job: the job.

    Raises:
        TrainingError: not all tasks came together.
    """

    def __init__(self, job: JobEnvironment) -> None:
        self._job, self._host = job, job.hostnames[0]
        self._leads = job.global_rank == 0
        self._attempts = 0
        port = PORTS[int(job.raw_job_id) % len(PORTS)]
        try:
            self._store = self._meet(port, wait=True)
        except RuntimeError as error:
            raise TrainingError(
                "the tasks of the job cannot reach each other",
                found=str(error).splitlines()[0],
                expected=f"{job.num_tasks} tasks at {self._host}, port {port}",
                remedy="see the logs of the other tasks in .submitit/",
            ) from error
        self._store.set_timeout(PATIENCE)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """The first one sends the others home."""
        if self._leads:
            self._store.set(self._key(), "0")
            with contextlib.suppress(RuntimeError):  # one that is gone
                self._store.wait([f"left/{rank}" for rank in range(1, self._job.num_tasks)], GRACE)

    def start(self) -> None:
        """Begin an attempt, on a port of its own: nothing of an earlier one can get into it."""
        self._attempt = self._meet(0)
        self._store.set(self._key(), str(self._attempt.port))
        self._attempts += 1

    def follow(self) -> bool:
        """Wait for the next attempt; false if there is none.

        Raises:
            RuntimeError: the first task is gone.
        """
        port = int(self._store.get(self._key()))
        if not port:
            self._store.set(f"left/{self._job.global_rank}", "")
            return False
        self._attempt = self._meet(port)
        self._attempts += 1
        return True

    def variables(self) -> dict[str, str]:
        """What torchrun tells a worker: who and where it is, and that the store of the attempt is there already."""
        job = self._job
        return {
            "RANK": str(job.global_rank),
            "WORLD_SIZE": str(job.num_tasks),
            "LOCAL_RANK": str(job.local_rank),
            "GROUP_RANK": str(job.node),
            "GROUP_WORLD_SIZE": str(job.num_nodes),
            "MASTER_ADDR": self._host,
            "MASTER_PORT": str(self._attempt.port),
            "TORCHELASTIC_RUN_ID": job.job_id,
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }

    def wait(self, worker: subprocess.Popen[bytes]) -> int:
        """Wait for a worker. When another one has failed, or the first is through, it has a minute left.

        Returns:
            Its exit status, when those of the others have ended too.

        Raises:
            RuntimeError: another task is gone.
        """
        deadline = None
        while (code := worker.poll()) is None:
            if deadline is None and self._over():
                deadline = time.monotonic() + GRACE.total_seconds()
            if deadline is not None and time.monotonic() > deadline:
                worker.kill()
            time.sleep(POLL)
        if code or self._leads:
            self._attempt.set("over", "")
        self._attempt.set(f"ended/{self._job.global_rank}", "")
        if self._leads:
            self._attempt.wait([f"ended/{rank}" for rank in range(self._job.num_tasks)], 2 * GRACE)
        return code

    def _over(self) -> bool:
        try:
            return bool(self._attempt.check(["over"]))
        except RuntimeError:  # the first task is gone
            return True

    def _key(self) -> str:
        return f"attempt/{self._attempts}"

    def _meet(self, port: int, *, wait: bool = False) -> TCPStore:
        from torch._C._distributed_c10d import TCPStore

        return TCPStore(self._host, port, self._job.num_tasks, self._leads, GATHERING, wait_for_workers=wait)
