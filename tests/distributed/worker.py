"""What every rank of a test runs: the jobs of a JSON file, one after the other, in one process group.

torchrun --nproc-per-node N worker.py FILE

A job has `do`, `options` of `upcycle train`, and what its function below asks for. Each leaves its result on the disk.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import warnings
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import distributed
from torch.distributed.tensor import DTensor

from upcycle.distributed import ranks as ranks_module
from upcycle.distributed.ranks import join_ranks
from upcycle.routing import install
from upcycle.train import module
from upcycle.train.config import TrainConfig
from upcycle.train.fit import device_of
from upcycle.train.models import start_model
from upcycle.train.run import train


class Stop(Exception):
    """A crash."""


def run(config: TrainConfig, job: dict[str, Any]) -> None:
    """Train; `stop_after` crashes all ranks after that step, `dies` one of them."""
    dies = job.get("dies", {})

    def crash(self: module.TrainingModule, *_: Any) -> None:
        if self.global_step == job.get("stop_after"):
            raise Stop
        if (self.global_step, distributed.get_rank()) == (dies.get("step"), dies.get("rank")):
            Path(dies["noted"]).write_text(str(time.time()))
            if dies["way"] == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise LookupError("out of luck")

    module.TrainingModule.on_train_batch_end = crash  # type: ignore[method-assign]
    with suppress(Stop):
        train(config, on_start=lambda _run: [])


def start(config: TrainConfig, job: dict[str, Any]) -> None:
    """Build the model; save it whole to `file`, and what each rank read and holds beside it."""
    ranks = join_ranks(config.parallel, device_of(config))
    started = start_model(config, ranks)
    whole, held = {}, 0
    for name, value in started.model.state_dict().items():
        # torch cannot gather a tensor without elements, such as those of Qwen2-MoE's shared expert of width 0.
        whole[name] = value.full_tensor() if isinstance(value, DTensor) and value.numel() else value
        held += value.to_local().numel() if isinstance(value, DTensor) else value.numel()
    read: list[Any] = [None] * ranks.size
    distributed.all_gather_object(read, {"bytes_read": started.bytes_read, "elements": held})
    if ranks.main:
        torch.save({name: value for name, value in whole.items() if value.numel()}, job["file"])
        Path(job["file"]).with_suffix(".json").write_text(json.dumps(read))


MUTANTS = {
    "loads of one rank": lambda: setattr(install, "sum_over_ranks", lambda load_LN: load_LN),
    "clipping by one rank's norm": lambda: setattr(module, "clip_by_norm", _clip_locally),
    "metrics of one rank": lambda: setattr(
        ranks_module.Ranks, "sum", lambda self, values: values * (self.layout.data if values.is_floating_point() else 1)
    ),
}


def _clip_locally(parameters: Any, limit: float) -> Any:
    local = [each.grad.to_local() for each in parameters if each.grad is not None]
    norm = torch.nn.utils.get_total_norm(local)
    torch._foreach_mul_(local, (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm


def pretend(package: str, other: str) -> None:
    """Say that another version of a package is installed."""
    ranks_module.version = lambda name: other if name == package else version(name)  # type: ignore[attr-defined]


def main() -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    for job in json.loads(Path(sys.argv[1]).read_text()):
        config = TypeAdapter(TrainConfig).validate_python(job["options"])
        if "mutant" in job:
            MUTANTS[job["mutant"]]()
        if "runs" in job and int(os.environ["RANK"]) == job["runs"]["rank"]:
            pretend(job["runs"]["package"], job["runs"]["version"])
        {"run": run, "start": start}[job["do"]](config, job)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
