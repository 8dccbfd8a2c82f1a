"""Assembles a run from its options, and runs it."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch

from upcycle.checkpoint import hash_files, open_reader
from upcycle.checkpoint.renames import check_renames
from upcycle.convert.beside import gathered
from upcycle.data.order import order_hash
from upcycle.distributed.failure import shared_failure
from upcycle.distributed.ranks import Ranks, join_ranks
from upcycle.distributed.shards import LAST
from upcycle.errors import ConfigError
from upcycle.files.durable import output_errors
from upcycle.models.source import expanded
from upcycle.options.extras import need
from upcycle.precision.install import check_precision
from upcycle.tracking.claim import claimed
from upcycle.tracking.record import CHECKPOINTS, MODEL, Record, Spectator
from upcycle.tracking.rows import keep_columns
from upcycle.tracking.schema import SCHEMA_VERSION
from upcycle.tracking.status import FAILED, FINISHED, RUNNING
from upcycle.tracking.wandb_training import TrainingMirror
from upcycle.train.ahead import check_ahead_options
from upcycle.train.checkpoints import steps_done
from upcycle.train.device import device_of
from upcycle.train.equip import equip
from upcycle.train.fit import fit
from upcycle.train.mirroring import Mirroring
from upcycle.train.models import start_model
from upcycle.train.module import TrainingModule
from upcycle.train.objectives.choose import kind_of
from upcycle.train.prepared import Run
from upcycle.train.surroundings import peak_memory, surroundings

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from lightning.pytorch import Callback
    from transformers import PreTrainedModel

    from upcycle.convert.beside import Beside
    from upcycle.train.config import TrainConfig
    from upcycle.train.start import Start

ORDER_HASHED = 10_000  # samples; an order is one function of the position, so its start identifies it


def train(config: TrainConfig, *, on_start: Callable[[Run], Sequence[Callback]]) -> Run:
    """Train.

    Args:
        config: the options.
        on_start: called with the run on the main rank when all is checked and built; returns further callbacks, such as
            progress.

    Returns:
        The run; on the main rank its record's `last` holds the last value of every metric.

    Raises:
        UpcycleError: anything wrong with the request, the source, the data or the output; nothing was trained.
        TrainingError: the loss stopped being finite.
    """
    check_options(config)
    ranks = join_ranks(config.parallel, device_of(config))
    with shared_failure(ranks):
        return _train(prepare_run(config, ranks), on_start)


def _train(run: Run, on_start: Callable[[Run], Sequence[Callback]]) -> Run:
    if not run.ranks.main:
        fit(run, [])
        return run
    callbacks = on_start(run)
    mirror = TrainingMirror(run.record, run.config.wandb)
    with ExitStack() as held:
        with _gathered(run.start, run.config) as beside:
            run.record.create()
            held.enter_context(claimed(run.record.directory))
            _keep_model(run.start.model, beside, run.record.directory / MODEL)
        _describe(run)
        with mirror:
            try:
                with shared_failure(run.ranks):  # for run.json
                    status = fit(run, [*callbacks, Mirroring(mirror.update)])
            except BaseException as error:
                run.record.describe(status=FAILED, error=str(error))
                raise
            run.record.describe(status=status, summary=run.record.last)
        if status == FINISHED:
            keep_columns(run.record.directory)
    return run


def _describe(run: Run) -> None:
    """Write what is known of a run before its first step."""
    run.record.describe(
        schema=SCHEMA_VERSION,
        status=RUNNING,
        config=asdict(run.config),
        **surroundings(),
        steps=run.steps,
        flops_per_step=run.flops_per_step,
        kernel=run.kernel,
        layout=asdict(run.ranks.layout),
        ranks=run.shares,
        data_hash=run.corpus.hash,
        order_hash=order_hash(run.corpus.order(run.config.seed), ORDER_HASHED),
        source_sha256=_source_sha256(run.start, run.config),
        manifest=run.start.manifest,
    )


def _gathered(start: Start, config: TrainConfig) -> AbstractContextManager[Beside]:
    own = start.origin is not None and config.tokenizer is None
    tokenizer = None if own else start.tokenizer
    return gathered(start.origin, start.model.config.to_json_string(), tokenizer=tokenizer)


def _keep_model(model: PreTrainedModel, beside: Beside, directory: Path) -> None:
    """Write what an export needs beside weights, and nothing else."""
    with output_errors(directory):
        model.config.save_pretrained(directory)
        for name, file in beside.files.items():
            (directory / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, directory / name)
        kept = {directory / name for name in ("config.json", *beside.files)}
        for file in directory.rglob("*"):
            if file.is_file() and file not in kept:
                file.unlink()


def prepare_run(config: TrainConfig, ranks: Ranks) -> Run:
    """Build model and data, and look at what is at the output; write nothing there."""
    check_batch(config, ranks.layout.data)
    check_precision(config.precision, config.quantise, compiled=config.compile, ranks=ranks.size)
    # On every rank: each may see the file system in another way.
    check_renames(expanded(config.output), links=ranks.size > 1)
    kind, again = Record if ranks.main else Spectator, config.resume == "auto"
    record = kind.open(expanded(config.output), asdict(config), overwrite=config.overwrite, resume=again)
    start = start_model(config, ranks)
    equipment = equip(start, config)
    if config.activation_checkpointing:
        start.model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    objective = kind_of(config)
    corpus = objective.samples(config, start)
    return Run(
        config=config,
        start=start,
        corpus=corpus,
        record=record,
        module=TrainingModule(
            start.model,
            moe=start.moe,
            routing=equipment.routing,
            emulation=equipment.emulation,
            objective=objective.make(config, start, corpus),
            config=config,
            steps=equipment.steps,
            ranks=ranks,
        ),
        kernel=equipment.kernel,
        steps=equipment.steps,
        flops_per_step=equipment.flops_per_step,
        resumed=0 if config.overwrite else steps_done(record.directory / CHECKPOINTS / LAST, ranks),
        ranks=ranks,
        shares=tuple(ranks.gather({"bytes_read": start.bytes_read, "peak_memory": peak_memory()})),
    )


def check_options(config: TrainConfig) -> None:
    """Check what needs neither model nor data.

    Raises:
        ConfigError: naming the option.
        MissingPackageError: wandb is not installed, and a mirror is asked for.
    """
    check_batch(config, 1)
    positive = {
        "log_every": config.log_every,
        "checkpoint_every": config.checkpoint_every,
        "validation.every": config.validation.every,
    }
    for name, value in positive.items():
        if value <= 0:
            raise ConfigError(f"{name} is out of range", found=value, expected="above 0")
    kind_of(config).check(config)
    check_ahead_options(config.mtp)
    if config.wandb.mode != "disabled":
        need(f"wandb.mode={config.wandb.mode}", "wandb")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda is not there", found="no CUDA device", remedy="set device=auto")


def check_batch(config: TrainConfig, data_ranks: int) -> None:
    """Check that a step's sequences can be shared.

    Args:
        config: the options.
        data_ranks: ranks with different samples.

    Raises:
        ConfigError: batch.micro does not divide them.
    """
    batch = config.batch
    micro = batch.micro_sequences(data_ranks)
    if batch.sequences < 1 or micro < 1 or batch.sequences % (micro * data_ranks):
        ranks = f" for {data_ranks} ranks with different samples" if data_ranks > 1 else ""
        raise ConfigError(
            f"batch.micro does not divide batch.sequences{ranks}",
            found=f"sequences={batch.sequences}, micro={batch.micro}",
            expected="a positive divisor, or null",
        )


def _source_sha256(start: Start, config: TrainConfig) -> dict[str, str] | None:
    """Of the files whose weights training started from, by name; None where there are none.

    What `convert` wrote has the dense model's weights, so those count, as for model=upcycle. A mixture that was trained
    since, or whose manifest is not there, is its own source.
    """
    if config.model == "scratch":
        return None
    known: dict[str, str] | None = start.manifest.get("source", {}).get("sha256")
    if known and "training" not in start.manifest:
        return known
    if config.model == "checkpoint" and start.moe:
        directory = expanded(str(config.source))
        return hash_files([directory / "config.json", *open_reader(directory).files]).result()
    assert start.source is not None
    return hash_files(start.source.files).result()
