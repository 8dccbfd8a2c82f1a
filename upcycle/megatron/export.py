"""`upcycle export format=megatron-bridge`: a checkpoint with a recipe beside it."""

from __future__ import annotations

import hashlib
import json
import logging
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from pydantic import TypeAdapter

from upcycle.arch.targets import TARGETS
from upcycle.checkpoint import Staging
from upcycle.convert.prepare import check_apart
from upcycle.errors import ConfigError, SourceError
from upcycle.megatron.layout import choose
from upcycle.megatron.recipe import Recipe, recipe_files, torn_groups
from upcycle.megatron.support import check_model, check_tokenizer, check_training, check_type
from upcycle.models.auxiliary import auxiliary_files
from upcycle.models.config import load_config, read_config
from upcycle.models.manifest import read_manifest
from upcycle.models.moe import describe_config
from upcycle.models.source import expanded
from upcycle.models.spelling import with_old_words
from upcycle.options.arguments import CONF, quoted, typed_options
from upcycle.parallel.config import WorkloadConfig
from upcycle.parallel.gpu import checked_gpu
from upcycle.parallel.sizes import checkpoint_sizes
from upcycle.tracking.record import MODEL, read_own_run
from upcycle.train.config import ExportConfig, RecipeConfig, TrainConfig
from upcycle.train.export import export, exported_config
from upcycle.train.schedule import check_schedule

if TYPE_CHECKING:
    from pathlib import Path

_log = logging.getLogger("upcycle")


def export_recipe(config: ExportConfig) -> Path:
    """Write a run, or a MoE checkpoint as it is, with a recipe beside it.

    Raises:
        ConfigError: neither or both are given, no layout fits, or Megatron cannot express the training.
        SourceError: there is nothing there, it has no tokenizer, or Megatron-Bridge cannot take the model.
        OutputError: the output cannot be written.
    """
    if (config.run is None) == (config.moe is None):
        raise ConfigError(
            "a recipe needs a run or a MoE checkpoint",
            found="neither" if config.run is None else "both",
            expected="run=DIR or moe=DIR",
        )
    return (
        _from_run(config, expanded(config.run)) if config.run else _from_checkpoint(config, expanded(str(config.moe)))
    )


def _from_run(config: ExportConfig, directory: Path) -> Path:
    run = read_own_run(directory)
    trained = TypeAdapter(TrainConfig).validate_python(run["config"])
    check_type(read_config(directory / MODEL))
    check_tokenizer(directory / MODEL)
    model, _ = exported_config(directory / MODEL, trained, run["manifest"], trained.moe.groups)
    files = _files(config, model, run["manifest"], trained, run["steps"] if config.steps is None else config.steps)
    return export(config, more=files)


def _from_checkpoint(config: ExportConfig, directory: Path) -> Path:
    output = expanded(config.output)
    check_apart(directory, output)
    fields = read_config(directory)
    check_type(fields)
    check_tokenizer(directory)
    if config.steps is None:
        raise ConfigError("a recipe for a checkpoint needs its length", found="steps=null", expected="steps=N")
    files = _files(config, load_config(directory), read_manifest(directory), _defaults(directory), config.steps)
    files |= _old_words(fields)
    if not any(directory.glob("*.safetensors")):
        raise SourceError("the checkpoint has no weights", found=directory, expected="*.safetensors")
    fingerprint = hashlib.sha256(repr((str(directory), sorted(files.items()))).encode()).hexdigest()
    with Staging.open(output, fingerprint=fingerprint, overwrite=config.overwrite, resume=None) as staging:
        for file in sorted({*directory.iterdir(), *auxiliary_files(directory)}):
            name = file.relative_to(directory).as_posix()
            if file.is_file() and name not in files:
                staging.copy_file(file, name)
        for name, text in files.items():
            staging.write_text(name, text)
        staging.commit()
    return output


def _old_words(fields: dict[str, Any]) -> dict[str, str]:
    """config.json as the transformers of a recipe reads it, where newer ones have words that it does not know."""
    target = TARGETS[fields["model_type"]]
    return {"config.json": json.dumps(with_old_words(fields, target), indent=2) + "\n"} if target.spelling else {}


def _defaults(directory: Path) -> TrainConfig:
    """The options of `upcycle train` for a checkpoint, none of them given."""
    running = GlobalHydra.instance().is_initialized()
    given = ["model=checkpoint", f"source={quoted(str(directory))}", "output=''"]
    with nullcontext() if running else hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        trained: TrainConfig = typed_options(TrainConfig, hydra.compose("train", overrides=given))
    return trained


def _files(
    config: ExportConfig, model: Any, manifest: dict[str, Any] | None, trained: TrainConfig, steps: int
) -> dict[str, str]:
    moe = describe_config(TARGETS[model.model_type], model, manifest)
    check_training(trained)
    check_model(model, moe)
    if moe.granularity > 1:
        _log.warning("%s, and with them what the dense model knew; this library keeps them", torn_groups(moe))
    if steps < 1:
        raise ConfigError("steps is out of range", found=steps, expected="1 or more")
    check_schedule(trained.schedule, steps=steps)
    workload = _workload(config.workload, trained)
    step = choose(config, checkpoint_sizes(model, moe), workload, model_type=moe.model_type)
    assert config.gpu
    gpu = checked_gpu(config.gpu)
    return recipe_files(Recipe(moe=moe, train=trained, steps=steps, step=step, gpu=gpu, nodes=config.nodes))


def _workload(asked: RecipeConfig, trained: TrainConfig) -> WorkloadConfig:
    usual = WorkloadConfig(
        sequences=trained.batch.sequences,
        micro=trained.batch.micro or 1,
        sequence_length=trained.sequence_length,
        activation_checkpointing=trained.activation_checkpointing,
    )
    return replace(usual, **{name: value for name, value in asdict(asked).items() if value is not None})
