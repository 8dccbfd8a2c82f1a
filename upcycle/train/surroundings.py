"""What a run ran on, for its record."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import torch

from upcycle.distributed.ranks import PACKAGES


def surroundings() -> dict[str, Any]:
    """Versions, hardware and commit, for run.json."""
    return {
        "started": datetime.now(UTC).isoformat(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "hardware": {
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
        "git_commit": _commit(),
    }


def peak_memory() -> int:
    """The most bytes of memory that this process has held so far, on the GPU where it has one."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _commit() -> str | None:
    """The commit of the working directory, where a user's own code and configs are."""
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
