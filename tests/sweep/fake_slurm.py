"""A SLURM of one machine, as far as submitit uses it: sbatch, srun, scontrol requeue, sacct.

`install` puts them into a directory. Every "node" is this machine. What SLURM does and this does too:

- a signal goes to the tasks, and not to what they started (as with its control groups);
- a requeued job is killed at once, with everything it started, and begins again;
- with SLURM_KILL_BAD_EXIT a task that fails takes the others of its job along.

There are no time limits: tests send the signal themselves.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

PROGRAMS = ("sbatch", "srun", "scontrol", "sacct")
STATE = "FAKE_SLURM"  # directory: JOB.json, JOB.batch and JOB.tasks of each job


def install(directory: Path) -> dict[str, str]:
    """Write the programs; returns the environment in which they are found."""
    programs = directory / "bin"
    programs.mkdir(parents=True)
    for name in PROGRAMS:
        file = programs / name
        file.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, "-P", __file__, name])} "$@"\n')
        file.chmod(0o755)
    return {"PATH": f"{programs}:{os.environ['PATH']}", STATE: str(directory)}


def jobs(directory: Path) -> dict[str, dict[str, Any]]:
    """What was submitted, by job: its parameters, how often it began, and its state."""
    return {file.stem: json.loads(file.read_text()) for file in sorted(directory.glob("*.json"))}


def note(job: str, **content: object) -> None:
    file = Path(os.environ[STATE]) / f"{job}.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    file.with_suffix(".draft").write_text(json.dumps(known | content))
    file.with_suffix(".draft").rename(file)


def sbatch(script: str) -> None:
    text = Path(script).read_text()
    given = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", text, flags=re.MULTILINE))
    given = {name: shlex.split(value)[0] if value else "" for name, value in given.items()}
    number = 1000 + 100 * len({name.split("_")[0] for name in jobs(Path(os.environ[STATE]))})
    indexes = range(int(given["array"].split("%")[0].split("-")[1]) + 1) if "array" in given else [None]
    names = [f"{number}" if index is None else f"{number}_{index}" for index in indexes]
    for name in names:
        note(name, given=given, script=text, state="PENDING", begun=0)
    for place, name in enumerate(names):
        keep = [sys.executable, "-P", __file__, "keep", name, str(number + place)]
        subprocess.Popen(keep, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    print(f"Submitted batch job {number}")


def keep(name: str, number: str) -> None:
    """Run a job until it ends without having been requeued."""
    place = Path(os.environ[STATE])
    job = jobs(place)[name]
    (place / f"{name}.sh").write_text(str(job["script"]))
    while True:
        note(name, state="RUNNING", begun=jobs(place)[name]["begun"] + 1)
        with output(job["given"], name).open("ab") as log:
            command = ["bash", place / f"{name}.sh"]
            batch = subprocess.Popen(command, env=os.environ | variables(job["given"], name, number), stdout=log)
            (place / f"{name}.batch").write_text(str(batch.pid))
            status = batch.wait()
        if jobs(place)[name]["state"] != "REQUEUED":
            break
    note(name, state="FAILED" if status else "COMPLETED")


def output(given: dict[str, str], name: str) -> Path:
    first, _, index = name.partition("_")
    file = Path(given["output"].replace("%A", first).replace("%a", index).replace("%j", first))
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


def variables(given: dict[str, str], name: str, number: str) -> dict[str, str]:
    """What SLURM tells a job."""
    nodes, tasks = int(given["nodes"]), int(given["ntasks-per-node"])
    first, _, index = name.partition("_")
    return {
        "SLURM_JOB_ID": number,
        "SLURM_NTASKS": str(nodes * tasks),
        "SLURM_NTASKS_PER_NODE": str(tasks),
        "SLURM_NNODES": str(nodes),
        "SLURM_JOB_NUM_NODES": str(nodes),
        "SLURM_JOB_NODELIST": ",".join(["localhost"] * nodes),
        "SLURM_JOB_NAME": given["job-name"],
        "FAKE_JOB": name,
        **({"SLURM_ARRAY_JOB_ID": first, "SLURM_ARRAY_TASK_ID": index} if index else {}),
    }


def srun(*arguments: str) -> None:
    """Start every task of the job, and wait for them."""
    start = arguments.index("-u") - 1  # the interpreter
    patterns = dict(zip(arguments[1:start:2], arguments[2:start:2], strict=True))
    tasks, here = int(os.environ["SLURM_NTASKS"]), int(os.environ["SLURM_NTASKS_PER_NODE"])
    started = []
    for rank in range(tasks):
        environment = {
            "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": str(rank % here),
            "SLURM_NODEID": str(rank // here),
        }
        out, error = (appending(patterns[stream], rank) for stream in ("--output", "--error"))
        command = arguments[start:]
        started.append(subprocess.Popen(command, env=os.environ | environment, stdout=out, stderr=error))
    pids = Path(os.environ[STATE]) / f"{os.environ['FAKE_JOB']}.tasks"
    pids.write_text(" ".join(str(task.pid) for task in started))
    while any(task.poll() is None for task in started):
        if any(task.poll() for task in started) and os.environ.get("SLURM_KILL_BAD_EXIT") == "1":
            for task in started:
                kill(task.pid)
        time.sleep(0.05)
    sys.exit(1 if any(task.returncode for task in started) else 0)


def appending(pattern: str, rank: int) -> int:
    """A task's file."""
    array, index = os.environ.get("SLURM_ARRAY_JOB_ID", ""), os.environ.get("SLURM_ARRAY_TASK_ID", "")
    known = {"%A": array, "%a": index, "%j": os.environ["SLURM_JOB_ID"], "%t": str(rank)}
    for mark, value in known.items():
        pattern = pattern.replace(mark, value)
    return os.open(pattern, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)


def kill(pid: int) -> None:
    """A process and all that it started, but for this one."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for each in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                if each.pid != os.getpid():
                    each.kill()


def scontrol(action: str, job: str) -> None:
    assert action == "requeue"
    note(job, state="REQUEUED")
    kill(int((Path(os.environ[STATE]) / f"{job}.batch").read_text()))


def signal_tasks(directory: Path, job: str) -> None:
    """What SLURM does when a job comes near to its limit."""
    for pid in (directory / f"{job}.tasks").read_text().split():
        os.kill(int(pid), signal.SIGUSR2)


def sacct(*_arguments: str) -> None:
    print("JobID|State|NodeList")
    for name, job in jobs(Path(os.environ[STATE])).items():
        print(f"{name}|{job['state']}|localhost")


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
