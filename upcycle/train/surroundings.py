"""What a run ran on, for its record."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from upcycle.distributed.ranks import PACKAGES


def surroundings() -> dict[str, Any]:
    """Versions, hardware (memory in bytes) and commit, for run.json.

    The commit is the working directory's, where a user's own code and configs are; it is dirty if files that it has
    were changed since.
    """
    changed = _git("--no-optional-locks", "status", "--porcelain", "--untracked-files=no")
    return {
        "started": datetime.now(UTC).isoformat(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "hardware": {
            "machine": platform.machine(),
            "cpu": _cpu(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": None if changed is None else bool(changed),
    }


def peak_memory() -> int:
    """The most bytes of memory that this process has held so far, on the GPU where it has one."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _cpu() -> str:
    """The name of its model, where Linux knows one, or else of its kind."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _git(*arguments: str) -> str | None:
    """What git says of the working directory; None where there is no git, no repository or no commit."""
    try:
        found = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
