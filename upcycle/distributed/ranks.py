"""This process among those that train together. Knows torch.distributed and how launchers number processes."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

from upcycle.errors import ConfigError
from upcycle.parallel.config import FoldingConfig
from upcycle.parallel.rank_layout import RankLayout, resolve

if TYPE_CHECKING:
    from lightning.fabric.plugins import ClusterEnvironment
    from torch import Tensor

    from upcycle.parallel.config import ParallelConfig

PACKAGES = ("upcycle", "torch", "lightning", "transformers")
# Rank 0 hashes the source, tokenizes the text and writes the record while the others wait.
TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process, and the layout that it is part of.

    Attributes:
        rank: of this process, from 0.
        layout: of all.
        environment: who started the processes; None where there is one.
    """

    rank: int = 0
    layout: RankLayout = RankLayout()
    environment: ClusterEnvironment | None = None

    @property
    def size(self) -> int:
        return self.layout.ranks

    @property
    def nodes(self) -> int:
        """Machines, as torchrun or SLURM says."""
        return int(os.environ.get("GROUP_WORLD_SIZE") or os.environ.get("SLURM_NNODES") or 1)

    @property
    def main(self) -> bool:
        """Whether this is the process that prints and writes what is not sharded."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Which share of every batch this process takes; the ranks of a TP group take the same."""
        return self.rank // self.layout.tp

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the ranks that see different samples. Every process has to call it."""
        if self.size == 1:
            return values
        total = values.clone()
        distributed.all_reduce(total)
        return total // self.layout.tp if not total.is_floating_point() else total / self.layout.tp

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether it holds on some rank. Every process has to call it."""
        return bool(self.sum(torch.tensor(int(flag) * self.layout.tp, device=device))) if self.size > 1 else flag

    def gather(self, fact: Any) -> list[Any]:
        """What every rank says, in their order. Every process has to call it."""
        facts: list[Any] = [fact] * self.size
        if self.size > 1:
            distributed.all_gather_object(facts, fact)
        return facts

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.size > 1:
            distributed.barrier()


ALONE = Ranks()


def layout_of(config: ParallelConfig | FoldingConfig | None, started: int) -> RankLayout:
    """What so many processes are to each other.

    Args:
        config: `parallel`; None is for one process.
        started: processes.

    Raises:
        ConfigError: several processes without a layout, or a layout that does not have that many ranks.
    """
    if isinstance(config, FoldingConfig):
        raise ConfigError(
            "parallel=folding is Megatron-Core's, which upcycle train does not run",
            found="parallel=folding",
            expected="fsdp, ep, tp_ep or hsdp_ep",
            remedy="plan with it, and train with Megatron-Bridge",
        )
    if config is None:
        if started > 1:
            raise ConfigError(
                "several processes were started, and nothing says how they share the model",
                found=f"{started} processes, parallel=null",
                remedy="choose a layout, such as parallel=fsdp or parallel=ep, or start one process",
            )
        return RankLayout()
    layout = resolve(config, started)
    if started == 1:
        raise ConfigError(
            "a layout is for several processes",
            found="one process",
            expected="torchrun or srun",
            remedy="torchrun --nproc-per-node=4 --no-python upcycle train ..., or leave parallel out",
        )
    return layout


def join_ranks(config: ParallelConfig | FoldingConfig | None, device: torch.device) -> Ranks:
    """Join the processes that torchrun or SLURM started.

    Args:
        config: `parallel`; None is for one process.
        device: cpu or cuda.

    Raises:
        ConfigError: as for `layout_of`, or the processes run different versions.
    """
    environment = _environment()
    layout = layout_of(config, environment.world_size() if environment else 1)
    if environment is None or layout.ranks == 1:
        return ALONE
    if not distributed.is_initialized():
        _initialise(environment, device)
    ranks = Ranks(rank=environment.global_rank(), layout=layout, environment=environment)
    _check_versions(ranks)
    if not ranks.main:
        logging.getLogger("upcycle").setLevel(logging.WARNING)  # rank 0 says what is the same on all
    return ranks


def leave_ranks() -> None:
    """End the process group, where there is one, after all that it was for."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def _check_versions(ranks: Ranks) -> None:
    of_rank = ranks.gather({name: version(name) for name in PACKAGES})
    for rank, found in enumerate(of_rank):
        if found != of_rank[0]:
            differing = [name for name in PACKAGES if found[name] != of_rank[0][name]]
            raise ConfigError(
                "the ranks run different versions",
                found="; ".join(f"{n} {of_rank[0][n]} on rank 0, {found[n]} on rank {rank}" for n in differing),
                expected="one environment on every node",
            )


def _environment() -> ClusterEnvironment | None:
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
    from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

    kinds = (TorchElasticEnvironment, SLURMEnvironment)
    return next((kind() for kind in kinds if kind.detect()), None)


def _initialise(environment: ClusterEnvironment, device: torch.device) -> None:
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = environment.main_address, str(environment.main_port)
    os.environ["LOCAL_RANK"] = str(environment.local_rank())
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(environment.local_rank())
    distributed.init_process_group(
        "nccl" if on_gpu else "gloo",
        rank=environment.global_rank(),
        world_size=environment.world_size(),
        timeout=TIMEOUT,
        device_id=torch.device("cuda", environment.local_rank()) if on_gpu else None,
    )
