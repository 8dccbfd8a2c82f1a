"""Runs Lightning's loop over a run that is ready: trainer, callbacks, batches."""

from __future__ import annotations

import logging
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from torch.utils.data import DataLoader

from upcycle.data.order import PositionSampler
from upcycle.distributed.quiet import only_warnings
from upcycle.distributed.strategy import ShardedStrategy
from upcycle.precision.install import compute_dtype
from upcycle.tracking.status import FINISHED, INTERRUPTED
from upcycle.train.checkpoints import Checkpoints, checkpoint_io
from upcycle.train.device import device_of
from upcycle.train.metrics import ExpertSimilarity, TrainingMetrics
from upcycle.train.models import conversion_request, dense_shards
from upcycle.train.similarity import shard_reader
from upcycle.train.validation import Validation

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lightning.pytorch import Callback

    from upcycle.distributed.ranks import Ranks
    from upcycle.train.periodic import Periodic
    from upcycle.train.prepared import Run

_log = logging.getLogger("upcycle")


def fit(run: Run, callbacks: Sequence[Callback]) -> str:
    """Train to the end of the budget, or to a signal.

    Args:
        run: the run.
        callbacks: more of them, such as progress.

    Returns:
        FINISHED or INTERRUPTED.
    """
    config = run.config
    run.ranks.wait()  # until the record's directory is there
    checkpoints = Checkpoints(run.last_checkpoint.parent, run.ranks, every=config.checkpoint_every)
    run.record.forget_after(run.resumed or -1)  # without a checkpoint, all rows will come again
    measuring = _measuring(run, checkpoints)
    metrics = TrainingMetrics(
        run.record,
        run.ranks,
        measuring,
        every=config.log_every,
        flops_per_step=run.flops_per_step,
        peak_flops=config.peak_flops,
        routing=run.module.routing is not None and config.metrics != "off",
    )
    with _quiet_lightning():
        trainer = _trainer(run, [metrics, *measuring, checkpoints, *callbacks])
        trainer.fit(
            run.module,
            datamodule=_Data(run),
            ckpt_path=str(run.last_checkpoint) if run.resumed else None,
            weights_only=True,
        )
    if checkpoints.signalled:
        name = checkpoints.signalled.name
        _log.warning("stopped by %s after step %d: go on with resume=auto", name, trainer.global_step)
        return INTERRUPTED
    return FINISHED


def _trainer(run: Run, callbacks: list[Callback]) -> Trainer:
    config = run.config
    data = run.ranks.layout.data
    rest = compute_dtype(config.precision, config.quantise)
    return Trainer(
        accelerator=device_of(config).type,
        **_placed(run.ranks),
        precision="bf16-mixed" if rest is torch.bfloat16 else "32-true",
        max_steps=run.steps,
        accumulate_grad_batches=config.batch.sequences // (config.batch.micro_sequences(data) * data),
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=any(isinstance(each, ProgressBar) for each in callbacks),
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        default_root_dir=run.record.directory,
    )


def _placed(ranks: Ranks) -> dict[str, Any]:
    """What tells Lightning where the processes are, and who writes their checkpoints."""
    if ranks.environment is None:
        # Named, for Lightning would take one process in a job of SLURM for one of several.
        return {"devices": 1, "plugins": [checkpoint_io(), LightningEnvironment()]}
    return {
        "devices": ranks.size // ranks.nodes,
        "num_nodes": ranks.nodes,
        "strategy": ShardedStrategy(ranks.layout),
        "plugins": [ranks.environment],
    }


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Without what the panel says better, and without advice that is not for a reader of memory-mapped tokens."""
    with only_warnings("lightning.pytorch"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated.*")
        # A tensor-parallel embedding's, which no model of transformers changes in place.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        yield


def _measuring(run: Run, checkpoints: Checkpoints) -> list[Periodic]:
    config, moe = run.config, run.start.moe
    every = config.validation.every
    measuring: list[Periodic] = []
    if run.corpus.held_out:
        measuring.append(
            Validation(
                run.record,
                run.ranks,
                checkpoints,
                every=every,
                batch_size=config.batch.micro_sequences(run.ranks.layout.data),
                samples=config.validation.windows,
            )
        )
    if moe and config.metrics == "dense":
        shards = None
        comparable = moe.latent in (None, moe.hidden_size)  # experts of another size than the shards they came from
        if run.start.source and config.model != "scratch" and comparable:
            shards = shard_reader(dense_shards(run.start.source, moe, conversion_request(config)), moe)
        measuring.append(ExpertSimilarity(run.record, moe, shards, every=every))
    return measuring


class _Data(LightningDataModule):
    def __init__(self, run: Run) -> None:
        super().__init__()
        self._run = run

    def train_dataloader(self) -> Any:
        """Batches from the sample that follows the last optimizer step's."""
        assert self.trainer is not None
        config, corpus, ranks = self._run.config, self._run.corpus, self._run.ranks
        data = ranks.layout.data
        sampler = PositionSampler(
            corpus.order(config.seed),
            start=self.trainer.global_step * config.batch.sequences,
            batch_size=config.batch.micro_sequences(data) * data,
            rank=ranks.data_rank,
            world=data,
        )
        return DataLoader(corpus.train, batch_sampler=sampler, num_workers=config.workers)
