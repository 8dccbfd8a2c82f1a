"""What the steps need, and how they say that it is not there."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NoReturn

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

SKIPPED = 3
REPEATS, WARM_UP = 20, 5
ON_CPU = os.environ.get("STEPS_ON") == "cpu"  # to see that a step runs, where there is no GPU


def skip(reason: str) -> NoReturn:
    print(reason)
    sys.exit(SKIPPED)


def device() -> torch.device:
    """The GPU; without one the step is skipped."""
    if ON_CPU:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        skip("no CUDA device")
    return torch.device("cuda")


def need(package: str) -> None:
    """Skip the step where a package is not installed."""
    if find_spec(package) is None:
        skip(f"{package} is not installed")


def say(found: dict[str, Any]) -> None:
    """End with what was found."""
    print(json.dumps(found))


def milliseconds(run: Callable[[], Any]) -> float:
    """Median time of a call on the device."""
    times = []
    for number in range(WARM_UP + REPEATS):
        start = time.perf_counter()
        run()
        if not ON_CPU:
            torch.cuda.synchronize()
        if number >= WARM_UP:
            times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)
