"""Assembles a run from its options, and runs it."""

from __future__ import annotations

import logging
import warnings
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from torch.utils.data import DataLoader

from upcycle.data.corpus import Corpus, build_corpus
from upcycle.data.order import PositionSampler, order_hash
from upcycle.errors import ConfigError
from upcycle.kernels.select import install_kernel
from upcycle.load import load_dense
from upcycle.routing.install import install_routers
from upcycle.source import expanded
from upcycle.tracking.record import CHECKPOINTS, MODEL, Record, surroundings
from upcycle.train.checkpoints import LAST, Checkpoints, checkpoint_io, read_checkpoint
from upcycle.train.flops import TRAINING_PASSES, forward_flops
from upcycle.train.metrics import ExpertSimilarity, TrainingMetrics
from upcycle.train.models import Start, conversion_request, dense_shards, start_model
from upcycle.train.module import TrainingModule
from upcycle.train.schedule import budget_steps, check_schedule
from upcycle.train.similarity import shard_reader
from upcycle.train.validation import Validation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from lightning.pytorch import Callback

    from upcycle.routing.install import Routing
    from upcycle.train.config import TrainConfig
    from upcycle.train.periodic import Periodic

ORDER_HASHED = 10_000  # samples; an order is one function of the position, so its start identifies it

_log = logging.getLogger("upcycle")


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run that is ready to start, or to go on.

    Attributes:
        config: the options.
        start: the model and what belongs to it.
        corpus: the text.
        record: the run's directory.
        module: what Lightning trains.
        kernel: name of the expert kernel; None for a dense model.
        steps: optimizer steps of the budget.
        flops_per_step: training FLOPs of one of them.
        resumed: optimizer steps of an earlier run of the same options.
    """

    config: TrainConfig
    start: Start
    corpus: Corpus
    record: Record
    module: TrainingModule
    kernel: str | None
    steps: int
    flops_per_step: int
    resumed: int

    @property
    def last_checkpoint(self) -> Path:
        return self.record.directory / CHECKPOINTS / LAST


def train(config: TrainConfig, *, on_start: Callable[[Run], Sequence[Callback]]) -> Run:
    """Train.

    Args:
        config: the options.
        on_start: called with the run when all is checked and built; returns further callbacks, such as progress.

    Returns:
        The run; its record's `last` holds the last value of every metric.

    Raises:
        UpcycleError: anything wrong with the request, the source, the data or the output; nothing was trained.
        TrainingError: the loss stopped being finite.
    """
    run = prepare_run(config)
    callbacks = on_start(run)
    run.record.create()
    _save_description(run.start, run.record.directory / MODEL)
    run.record.describe(
        status="running",
        config=asdict(config),
        **surroundings(),
        steps=run.steps,
        flops_per_step=run.flops_per_step,
        kernel=run.kernel,
        data_hash=run.corpus.hash,
        order_hash=order_hash(run.corpus.order(config.seed), ORDER_HASHED),
        manifest=run.start.manifest,
    )
    try:
        status = _fit(run, callbacks)
    except BaseException as error:
        run.record.describe(status="failed", error=str(error))
        raise
    run.record.describe(status=status, summary=run.record.last)
    return run


def prepare_run(config: TrainConfig) -> Run:
    """Check the options, build model and data, and look at what is at the output; write nothing there."""
    _check(config)
    record = Record.open(expanded(config.output), config)
    start = start_model(config)
    device = _device(config.device)
    kernel, routing = None, None
    if start.moe:
        choice = install_kernel(start.model, config.kernel, device=device, dtype=_dtype(config.precision))
        kernel, routing = choice.name, install_routers(start.model, start.moe, config.router, config.balance)
    if config.activation_checkpointing:
        start.model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    corpus = build_corpus(config.data, start.tokenizer, sequence_length=config.sequence_length)
    tokens_per_step = config.batch.sequences * config.sequence_length
    per_token = TRAINING_PASSES * forward_flops(start.model, start.moe, sequence_length=config.sequence_length)
    steps = budget_steps(config.budget, tokens_per_step=tokens_per_step, flops_per_step=per_token * tokens_per_step)
    check_schedule(config.schedule, steps=steps)
    return Run(
        config=config,
        start=start,
        corpus=corpus,
        record=record,
        module=_module(config, start, routing, steps),
        kernel=kernel,
        steps=steps,
        flops_per_step=per_token * tokens_per_step,
        resumed=0 if config.overwrite else _resumed(record.directory / CHECKPOINTS / LAST),
    )


def _check(config: TrainConfig) -> None:
    batch = config.batch
    micro = batch.micro or batch.sequences
    if batch.sequences < 1 or micro < 1 or batch.sequences % micro:
        raise ConfigError(
            "batch.micro does not divide batch.sequences",
            found=f"sequences={batch.sequences}, micro={batch.micro}",
            expected="a positive divisor, or null",
        )
    positive = {
        "log_every": config.log_every,
        "checkpoint_every": config.checkpoint_every,
        "validation.every": config.validation.every,
        "distill.temperature": config.distill.temperature,
    }
    for name, value in positive.items():
        if value <= 0:
            raise ConfigError(f"{name} is out of range", found=value, expected="above 0")
    if not 0 <= config.distill.weight <= 1:
        raise ConfigError("distill.weight is out of range", found=config.distill.weight, expected="0 to 1")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda is not there", found="no CUDA device", remedy="set device=auto")


def _module(config: TrainConfig, start: Start, routing: Routing | None, steps: int) -> TrainingModule:
    teacher = None
    if config.distill.weight:
        if start.source is None:
            raise ConfigError("distillation needs a dense source", found="none", remedy="set distill.weight=0")
        teacher = load_dense(start.source).requires_grad_(False)
    return TrainingModule(start.model, moe=start.moe, routing=routing, teacher=teacher, config=config, steps=steps)


def _fit(run: Run, callbacks: Sequence[Callback]) -> str:
    config = run.config
    checkpoints = Checkpoints(run.last_checkpoint.parent, every=config.checkpoint_every)
    run.record.forget_after(run.resumed or -1)  # without a checkpoint, all rows will come again
    measuring = _measuring(run, checkpoints)
    metrics = TrainingMetrics(
        run.record,
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
        return "interrupted"
    return "finished"


def _trainer(run: Run, callbacks: list[Callback]) -> Trainer:
    config = run.config
    return Trainer(
        accelerator=_device(config.device).type,
        devices=1,
        precision="bf16-mixed" if config.precision == "bfloat16" else "32-true",
        max_steps=run.steps,
        accumulate_grad_batches=config.batch.sequences // (config.batch.micro or config.batch.sequences),
        callbacks=callbacks,
        plugins=[checkpoint_io()],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=any(isinstance(each, ProgressBar) for each in callbacks),
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        default_root_dir=run.record.directory,
    )


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Without what the panel says better, and without advice that is not for a reader of memory-mapped tokens."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated.*")
            yield
    finally:
        logger.setLevel(level)


def _measuring(run: Run, checkpoints: Checkpoints) -> list[Periodic]:
    config, moe = run.config, run.start.moe
    every = config.validation.every
    measuring: list[Periodic] = []
    if run.corpus.held_out:
        measuring.append(
            Validation(
                run.corpus,
                run.record,
                checkpoints,
                every=every,
                batch_size=config.batch.micro or config.batch.sequences,
                windows=config.validation.windows,
            )
        )
    if moe and config.metrics == "dense":
        shards = None
        if run.start.source and config.model != "scratch":
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
        config, corpus = self._run.config, self._run.corpus
        sampler = PositionSampler(
            corpus.order(config.seed),
            start=self.trainer.global_step * config.batch.sequences,
            batch_size=config.batch.micro or config.batch.sequences,
            rank=self.trainer.global_rank,
            world=self.trainer.world_size,
        )
        return DataLoader(corpus.train, batch_sampler=sampler, num_workers=config.workers)


def _resumed(checkpoint: Path) -> int:
    return int(read_checkpoint(checkpoint)["global_step"]) if checkpoint.exists() else 0


def _save_description(start: Start, directory: Path) -> None:
    start.model.config.save_pretrained(directory)
    start.tokenizer.save_pretrained(directory)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _dtype(precision: str) -> torch.dtype:
    return torch.bfloat16 if precision == "bfloat16" else torch.float32
