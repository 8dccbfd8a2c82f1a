"""The tasks of a job end together, whichever of them fails, and however."""

from __future__ import annotations

import os
import random
import subprocess
import sys

import pytest
from ended import Ended

pytest.importorskip("submitit")
SOON = 90  # seconds
FOREVER = "import time; time.sleep(600)"
TELLS = "import os; raise SystemExit(int(os.environ['WORLD_SIZE'] + os.environ['RANK']))"  # as torchrun says it
TASK = """
import os, subprocess, sys
from datetime import timedelta
from upcycle.errors import UpcycleError
from upcycle.sweep import team

team.GRACE, team.GATHERING = timedelta(seconds=1), timedelta(seconds=float(sys.argv[2]))
job = team.submitted()
try:
    with team.Team(job) as tasks:
        tasks.follow() if job.global_rank else tasks.start()
        worker = subprocess.Popen([sys.executable, "-c", sys.argv[1]], env=os.environ | tasks.variables())
        print("started", flush=True)
        print(tasks.wait(worker))
        if job.global_rank:
            print(tasks.follow())
except UpcycleError as error:
    sys.exit(str(error))
"""


@pytest.fixture
def number() -> str:
    """Of the job; its port follows from it."""
    return str(random.Random(os.getpid()).randrange(1_000_000))


def task(number: str, rank: int, worker: str, gathering: float = SOON) -> Ended[str]:
    environment = {
        "SUBMITIT_EXECUTOR": "local",
        "SUBMITIT_LOCAL_JOB_ID": number,
        "SUBMITIT_LOCAL_NTASKS": "2",
        "SUBMITIT_LOCAL_GLOBALID": str(rank),
        "SUBMITIT_LOCAL_LOCALID": str(rank),
    }
    given = [sys.executable, "-c", TASK, worker, str(gathering)]
    pipe = subprocess.PIPE
    return Ended(given, env=os.environ | environment, stdout=pipe, stderr=pipe, text=True)


@pytest.mark.parametrize(
    ("workers", "codes"),
    [
        (("pass", "pass"), ("0", "0")),
        ((FOREVER, "raise SystemExit(3)"), ("-9", "3")),
        (("raise SystemExit(3)", FOREVER), ("3", "-9")),
        (("pass", FOREVER), ("0", "-9")),
        ((FOREVER, TELLS), ("-9", "21")),
    ],
)
def test_workers_end_together(workers: tuple[str, str], codes: tuple[str, str], number: str) -> None:
    with task(number, 0, workers[0]) as one, task(number, 1, workers[1]) as other:
        first, second = (each.communicate(timeout=SOON) for each in (one, other))
    assert first == (f"started\n{codes[0]}\n", "")
    assert second == (f"started\n{codes[1]}\nFalse\n", "")


@pytest.mark.parametrize(
    ("killed", "left"), [(0, FOREVER), (1, "import time; time.sleep(3)")], ids=["the first", "another"]
)
def test_a_task_that_is_killed_does_not_hang_the_other(killed: int, left: str, number: str) -> None:
    """Its worker is killed, or ends as training does when a rank is gone; there is nobody to go on with."""
    tasks = [task(number, rank, "import time; time.sleep(10)" if rank == killed else left) for rank in range(2)]
    with tasks[killed] as gone, tasks[1 - killed] as other:
        assert other.stdout
        assert other.stdout.readline() == "started\n"
        gone.kill()
        _, error = other.communicate(timeout=SOON)
        assert other.returncode == 1
        assert "Dist" in error


def test_a_task_that_does_not_come(number: str) -> None:
    with task(number, 0, FOREVER, gathering=2) as alone:
        out, error = alone.communicate(timeout=SOON)
    assert alone.returncode == 1
    assert not out
    assert "the tasks of the job cannot reach each other" in error
    assert "2 tasks at" in error
