"""What logging costs, as a share of a step at laptop scale: cheap metrics, the record, and its offline mirror in W&B.

    python benchmarks/log_cost.py [--steps 400] [--output FILE]

One run of the shipped model as E8G1T1 with the options of `scale=laptop`, on one thread. Everything that logging does
is timed where it is called, in seconds of the processor, so that what else the machine does counts little: what routers
count in every step, the sums of a step and a row in every fiftieth, and the mirror. What W&B does meanwhile, in threads
of this process and in its own service, counts too. The steps around it are what it is a share of. Left out are
validation, checkpoints, and what happens once: the steps to the second row, as W&B loads pandas with the first.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from environment import environment
from hydra import compose, initialize_config_dir
from lightning.pytorch import Callback

from upcycle.options.arguments import CONF, typed_options
from upcycle.routing import router
from upcycle.routing.statistics import RoutingSums
from upcycle.train.config import TrainConfig
from upcycle.train.metrics import TrainingMetrics
from upcycle.train.mirroring import Mirroring
from upcycle.train.run import train

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

LIMIT = 0.01  # of a step
ROOT = Path(__file__).parent.parent
NEVER = 10**9
MOE = ("model=upcycle", "moe.expansion=8", "moe.granularity=1", "moe.top_k=1")


class Stopwatch(Callback):
    """Seconds of the processor from a step on, by what they were spent on.

    Args:
        first: the steps before that are not timed.

    Attributes:
        seconds: `steps` (all of them), what was `watch`ed, W&B's `threads` here and its `service`.
        steps: that were timed.
    """

    def __init__(self, first: int) -> None:
        self.seconds: Counter[str] = Counter()
        self.steps = 0
        self._first = first
        self._running = False

    def watch(self, owner: Any, name: str, label: str) -> None:
        """Time the calls of a function."""
        inner = getattr(owner, name)

        def timed(*given: Any, **named: Any) -> Any:
            start = time.thread_time()
            try:
                return inner(*given, **named)
            finally:
                if self._running:
                    self.seconds[label] += time.thread_time() - start

        setattr(owner, name, timed)

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self._first:
            self._running = True
            self._add(-1)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.steps += self._running
        if trainer.global_step == trainer.max_steps:
            self._add(1)
            self._running = False

    def _add(self, sign: int) -> None:
        main, here = time.thread_time(), time.process_time()
        service = [each.cpu_times() for each in psutil.Process().children(recursive=True)]
        self.seconds["steps"] += sign * main
        self.seconds["threads"] += sign * (here - main)
        self.seconds["service"] += sign * sum(each.user + each.system for each in service)


def options(output: Path, steps: int, overrides: tuple[str, ...]) -> TrainConfig:
    given = [
        *MOE,
        "scale=laptop",
        f"source='{ROOT / 'models/stdlib-250k'}'",
        f"output='{output}'",
        "budget.flops=null",
        f"budget.steps={steps}",
        f"validation.every={NEVER}",
        f"checkpoint_every={NEVER}",
        "wandb.mode=offline",
        "progress=false",
        *overrides,
    ]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return typed_options(TrainConfig, compose("train", overrides=given))


def measured(steps: int, *overrides: str) -> dict[str, Any]:
    """Train, and say what logging took."""
    with tempfile.TemporaryDirectory() as directory:
        config = options(Path(directory) / "run", steps, overrides)
        watch = Stopwatch(2 * config.log_every)
        watch.watch(router, "measure", "routers")
        watch.watch(RoutingSums, "__add__", "routers")
        watch.watch(TrainingMetrics, "on_train_batch_end", "rows")
        watch.watch(Mirroring, "on_train_batch_start", "mirror")
        train(config, on_start=lambda _run: [watch])
    total = watch.seconds.pop("steps")
    shares = {label: seconds / total for label, seconds in watch.seconds.items()}
    return {
        "steps": watch.steps,
        "log_every": config.log_every,
        "seconds_per_step": total / watch.steps,
        "share": sum(shares.values()),
        "shares": shares,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    given = parser.parse_args()
    torch.set_num_threads(1)
    result = measured(given.steps)
    print(json.dumps(result, indent=2))
    if given.output:
        given.output.write_text(json.dumps({"environment": environment(), **result}, indent=2) + "\n")
    if result["share"] > LIMIT:
        sys.exit(f"over the limit of {LIMIT:.0%} of a step")


if __name__ == "__main__":
    main()
