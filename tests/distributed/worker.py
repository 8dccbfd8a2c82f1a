"""What every rank of a test runs: the jobs of a JSON file, one after the other, in one process group.

torchrun --nproc-per-node N worker.py FILE

A job has `do`, `options` of `upcycle train`, and what its function below asks for. Each leaves its result on the disk;
one with `refused` is to fail on every rank, and leaves there what each says.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import warnings
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import distributed
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from upcycle.distributed import ranks as ranks_module
from upcycle.distributed.ranks import Ranks, join_ranks
from upcycle.errors import UpcycleError
from upcycle.routing import install
from upcycle.train import module
from upcycle.train.config import TrainConfig
from upcycle.train.device import device_of
from upcycle.train.models import start_model
from upcycle.train.objectives import causal_lm
from upcycle.train.run import train

if TYPE_CHECKING:
    from collections.abc import Iterator


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
    whole = {}
    for name, value in started.model.state_dict().items():
        # torch cannot gather a tensor without elements, such as those of Qwen2-MoE's shared expert of width 0.
        whole[name] = value.full_tensor() if isinstance(value, DTensor) and value.numel() else value
    parameters = started.model.parameters()
    held = sum((each.to_local() if isinstance(each, DTensor) else each).numel() for each in parameters)
    read: list[Any] = [None] * ranks.size
    distributed.all_gather_object(read, {"bytes_read": started.bytes_read, "elements": held})
    if ranks.main:
        torch.save({name: value for name, value in whole.items() if value.numel()}, job["file"])
        Path(job["file"]).with_suffix(".json").write_text(json.dumps(read))


def _full_disk(patch: pytest.MonkeyPatch) -> None:
    before = FileSystem.create_stream

    @contextmanager
    def create_stream(self: FileSystem, path: Any, mode: str) -> Iterator[Any]:
        full = mode == "wb" and Path(path).name.startswith("__1_")
        with before(self, "/dev/full" if full else path, mode) as stream:
            yield stream

    patch.setattr(FileSystem, "create_stream", create_stream)


def _bad_loss(patch: pytest.MonkeyPatch) -> None:
    if os.environ["RANK"] == "1":
        patch.setattr(causal_lm, "token_loss", lambda logits, _labels: logits.mean() * float("nan"))


def _bad_embedding(patch: pytest.MonkeyPatch) -> None:
    before = module.TrainingModule.training_step

    def poisoned(self: module.TrainingModule, batch: Any, batch_idx: int) -> Any:
        other, its = (set(ids.flatten().tolist()) for ids in self.ranks.gather(batch["input_ids"]))
        weight = self.model.get_input_embeddings().weight
        _, (first, _) = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
        row = min(its - other) - first
        if 0 <= row < len(weight.to_local()):
            weight.to_local().data[row] = float("nan")
        return before(self, batch, batch_idx)

    patch.setattr(module.TrainingModule, "training_step", poisoned)


def _clipping_locally(patch: pytest.MonkeyPatch) -> None:
    def clip(parameters: Any, limit: float) -> Any:
        local = [each.grad.to_local() for each in parameters if each.grad is not None]
        norm = torch.nn.utils.get_total_norm(local)
        torch._foreach_mul_(local, (limit / (norm + 1e-6)).clamp(max=1.0))
        return norm

    patch.setattr(module, "clip_by_norm", clip)


def _measuring_locally(patch: pytest.MonkeyPatch) -> None:
    def add(self: Ranks, values: Any) -> Any:
        return values * (self.layout.data if values.is_floating_point() else 1)

    patch.setattr(Ranks, "sum", add)


CHANGES = {
    "loads of one rank": lambda patch: patch.setattr(install, "sum_over_ranks", lambda load_LN: load_LN),
    "clipping by one rank's norm": _clipping_locally,
    "metrics of one rank": _measuring_locally,
    "the same data for all replicas": lambda patch: patch.setattr(
        Ranks, "data_rank", property(lambda self: self.rank % self.layout.fsdp)
    ),
    "gradients of experts that no rank divides": lambda patch: patch.setattr(
        FSDPModule, "set_gradient_divide_factor", lambda self, factor: None
    ),
    "rank 1's disk is full": _full_disk,
    "rank 1's loss is NaN": _bad_loss,
    "the embedding of a token is NaN that only rank 1 has": _bad_embedding,
}


def pretend(package: str, other: str) -> None:
    """Say that another version of a package is installed."""
    ranks_module.version = lambda name: other if name == package else version(name)  # type: ignore[attr-defined]


def do(job: dict[str, Any]) -> None:
    """Do a job, with the change to the code that it names."""
    config = TypeAdapter(TrainConfig).validate_python(job["options"])
    with pytest.MonkeyPatch.context() as patch:
        if "change" in job:
            CHANGES[job["change"]](patch)
        {"run": run, "start": start}[job["do"]](config, job)


def main() -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    for job in json.loads(Path(sys.argv[1]).read_text()):
        if "runs" in job and int(os.environ["RANK"]) == job["runs"]["rank"]:
            pretend(job["runs"]["package"], job["runs"]["version"])
        if "refused" not in job:
            do(job)
            continue
        try:
            do(job)
        except UpcycleError as error:
            Path(f"{job['refused']}.{os.environ['RANK']}").write_text(str(error))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
