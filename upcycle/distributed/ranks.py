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

_log = logging.getLogger("upcycle")
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


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How processes were started.

    Attributes:
        processes: how many.
        known_by: where the number comes from.
        one: how to start one instead.
    """

    processes: int
    known_by: str = ""
    one: str = "start one process"


def layout_of(config: ParallelConfig | FoldingConfig | None, launch: Launch) -> RankLayout:
    """What the processes of a launch are to each other.

    Args:
        config: `parallel`; None is for one process.
        launch: how they were started.

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
        if launch.processes > 1:
            raise ConfigError(
                "several processes were started, and nothing says how they share the model",
                found=f"{launch.processes} processes{launch.known_by}, parallel=null",
                remedy=f"choose a layout, such as parallel=fsdp or parallel=ep, or {launch.one}",
            )
        return RankLayout()
    if launch.processes == 1:
        raise ConfigError(
            "a layout is for several processes",
            found=f"one process{launch.known_by}",
            expected="torchrun or srun",
            remedy="torchrun --nproc-per-node=4 --no-python upcycle train ..., in a job of several tasks "
            "srun upcycle train ..., or leave parallel out",
        )
    return resolve(config, launch.processes)


def join_ranks(config: ParallelConfig | FoldingConfig | None, device: torch.device) -> Ranks:
    """Join the processes that torchrun or SLURM started.

    Args:
        config: `parallel`; None is for one process.
        device: cpu or cuda.

    Raises:
        ConfigError: as for `layout_of`; SLURM does not say how many tasks a machine has; or the processes run different
            versions.
    """
    environment, launch = _launched()
    layout = layout_of(config, launch)
    if environment is None or layout.ranks == 1:
        if environment is None and launch.known_by:
            _log.info("one process%s", launch.known_by)
        return ALONE
    if not distributed.is_initialized():
        _initialise(environment, device)
    ranks = Ranks(rank=environment.global_rank(), layout=layout, environment=environment)
    _check_versions(ranks)
    if not ranks.main:
        _log.setLevel(logging.WARNING)  # rank 0 says what is the same on all
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


def _launched() -> tuple[ClusterEnvironment | None, Launch]:
    """Who started the processes, and how many; None for one that nobody started with others.

    An allocation's SLURM_NTASKS says how many tasks srun would start. Only the processes that it did start have a step.
    """
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
    from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

    if TorchElasticEnvironment.detect():
        elastic = TorchElasticEnvironment()
        processes = elastic.world_size()
        return elastic, Launch(
            processes=processes, known_by=f" (torchrun's WORLD_SIZE={processes})", one="start one without torchrun"
        )
    tasks = int(os.environ.get("SLURM_NTASKS", "1"))
    if "SLURM_STEP_ID" not in os.environ:
        aside = f" (srun did not start it; the job's SLURM_NTASKS={tasks} is for srun)" if tasks > 1 else ""
        return None, Launch(processes=1, known_by=aside)
    if tasks == 1 or not SLURMEnvironment.detect():
        return None, Launch(processes=1)
    launch = Launch(
        processes=tasks,
        known_by=f" (SLURM_NTASKS={tasks} of srun)",
        one="start one: srun --ntasks=1 upcycle train ..., "
        "or in a shell that srun started SLURM_NTASKS=1 upcycle train ...",
    )
    if "SLURM_NTASKS_PER_NODE" not in os.environ:
        each = tasks // ALONE.nodes
        raise ConfigError(
            "SLURM does not say how many tasks a node has",
            found=f"SLURM_NTASKS={tasks}, no SLURM_NTASKS_PER_NODE",
            remedy=f"srun --ntasks-per-node={each} upcycle train ..., or {launch.one}",
        )
    return SLURMEnvironment(), launch


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
