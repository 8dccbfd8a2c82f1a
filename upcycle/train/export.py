"""A trained run as a Hugging Face checkpoint that plain transformers loads."""

from __future__ import annotations

import hashlib
import json
import shutil
from typing import TYPE_CHECKING, Any

import torch
from pydantic import TypeAdapter
from torch import nn

from upcycle.arch.engines import Serving, serving
from upcycle.arch.head import attributes_of, head_of
from upcycle.arch.targets import TARGETS
from upcycle.checkpoint import Staging
from upcycle.convert.beside import gathered
from upcycle.convert.card import trained_card
from upcycle.convert.prepare import check_apart
from upcycle.errors import ConfigError, OutputError
from upcycle.models.ahead import NAME, attach, load_block
from upcycle.models.auxiliary import GENERATION_CONFIG
from upcycle.models.config import load_config, read_config
from upcycle.models.heads import auto_class
from upcycle.models.load import quietly
from upcycle.models.manifest import FORMAT, MANIFEST
from upcycle.models.moe import config_features, describe_config, regrouped, target_of
from upcycle.models.padding import with_padding
from upcycle.models.source import expanded
from upcycle.models.spelling import with_old_words
from upcycle.routing.export import export_fields
from upcycle.routing.release import groups_at
from upcycle.tracking.record import CHECKPOINTS, MODEL, NOT_COMPARED, read_own_run
from upcycle.train.checkpoints import exported_checkpoint
from upcycle.train.config import ExportConfig, TrainConfig

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from transformers import PreTrainedModel

    from upcycle.arch.target import Target
    from upcycle.models.moe import MoeDescription

PREFIX = "model."
KEPT = ("train/loss", "val/loss", "train/mse", "val/mse", "train/tokens", "train/flops")


def export(config: ExportConfig, *, more: Mapping[str, str] | None = None) -> Path:
    """Write a run's checkpoint, and load it again to compare every tensor.

    Args:
        config: the options; those of a recipe are not looked at.
        more: texts of further files, by name.

    Raises:
        SourceError: there is no run, or no checkpoint in it.
        RecordError: the run is another project's, or of another version of the schema.
        ConfigError: the model's type cannot store how it was routed; names the option.
        OutputError: the output cannot be written, or does not load as what was trained.
    """
    if config.run is None:
        raise ConfigError("nothing to export", found="run=null", expected="run=DIR", remedy="add run=DIR")
    directory, output = expanded(config.run), expanded(config.output)
    check_apart(directory, output)
    run = read_own_run(directory)
    content = exported_checkpoint(directory / CHECKPOINTS / f"{config.checkpoint}.ckpt")
    trained = TypeAdapter(TrainConfig).validate_python(run["config"])
    weights, dtype = own_weights(content["state_dict"]), getattr(torch, config.dtype)
    with quietly():
        groups = groups_at(trained.router, step=content["global_step"], steps=run["steps"]) or trained.moe.groups
        model, moe = _model(directory / MODEL, trained, run["manifest"], weights, groups)
        nn.Module.to(model, dtype)
        target = target_of(model.config.to_dict())
        fingerprint = hashlib.sha256(json.dumps([run["config"], content["global_step"]]).encode()).hexdigest()
        written = with_padding(model, target) if target and config.portable else model
        with (
            gathered(directory / MODEL, model.config.to_json_string()) as beside,
            Staging.open(output, fingerprint=fingerprint, overwrite=config.overwrite, resume=None) as staging,
        ):
            written.save_pretrained(staging.directory)
            if spelt := target or TARGETS.get(model.config.model_type):
                _rewrite_config(staging.directory / "config.json", spelt, tied=model.config.tie_word_embeddings)
            for file in staging.directory.glob("*.safetensors"):
                shutil.copymode(staging.directory / "config.json", file)  # safetensors' is for its owner alone
            (staging.directory / GENERATION_CONFIG).unlink(missing_ok=True)  # made of config.json
            beside.stage(staging, model.config.model_type)
            manifest = {"format": FORMAT, **run["manifest"], "training": _training(run, content, config)}
            if moe and "moe" in manifest:
                manifest["moe"] = {**manifest["moe"], "groups": moe.groups}
            staging.write_text(MANIFEST, json.dumps(manifest, indent=1, sort_keys=True) + "\n")
            card = trained_card(
                manifest,
                model_type=model.config.model_type,
                head=head_of(model.config.to_dict()),
                attributes=attributes_of(model.config),
                parameters=model.num_parameters(),
                zeros=_stored(written) - _stored(model),
                served=_served(target, model, portable=config.portable) if target else (),
                remarks=beside.remarks,
            )
            for name, text in {"README.md": card, **(more or {})}.items():
                staging.write_text(name, text)
            _check_loads(staging.directory, written, model, weights)
            staging.commit()
    return output


def exported_config(
    description: Path, trained: TrainConfig, manifest: dict[str, Any], groups: str
) -> tuple[Any, MoeDescription | None]:
    """The transformers configuration of an exported run, which says how it routes, and what MoE it is.

    Args:
        description: directory of the run's own configuration.
        trained: the run's options.
        manifest: of what it started from.
        groups: how experts are chosen, or auto.

    Raises:
        ConfigError: the model's type cannot store that; names the option.
    """
    config = load_config(description)
    target = target_of(config.to_dict())
    if target is None:
        return config, None
    moe = regrouped(describe_config(target, config, manifest), groups)
    for name, value in export_fields(moe, trained.router, trained.balance).items():
        setattr(config, name, value)
    return config, moe


def _model(
    description: Path, trained: TrainConfig, manifest: dict[str, Any], state: dict[str, torch.Tensor], groups: str
) -> tuple[PreTrainedModel, MoeDescription | None]:
    exported, moe = exported_config(description, trained, manifest, groups)
    kind = auto_class(head_of(exported.to_dict()))
    model: PreTrainedModel = kind.from_config(exported, dtype=torch.float32)
    if any(name.startswith(f"{NAME}.") for name in state):
        attach(model)
    model.load_state_dict(state)
    model.eval()
    return model, moe


def _rewrite_config(file: Path, target: Target, *, tied: bool) -> None:
    """Say of the head what holds where it is loaded, and all of it in old words too."""
    written = {**json.loads(file.read_text()), "tie_word_embeddings": tied}
    file.write_text(json.dumps(with_old_words(written, target), indent=2, sort_keys=True) + "\n")


def _stored(model: PreTrainedModel) -> int:
    """Parameters, of which a tied head counts on its own."""
    return sum(value.numel() for _, value in model.named_parameters(remove_duplicate=False))


def _served(target: Target, model: PreTrainedModel, *, portable: bool) -> tuple[Serving, ...]:
    return serving(target.model_type, config_features(target, model.config, portable=portable))


def _training(run: dict[str, Any], content: dict[str, Any], config: ExportConfig) -> dict[str, Any]:
    summary = run.get("summary", {})
    return {
        "checkpoint": config.checkpoint,
        "step": content["global_step"],
        "config": {name: value for name, value in run["config"].items() if name not in NOT_COMPARED},
        "versions": run["versions"],
        "data_hash": run["data_hash"],
        "order_hash": run["order_hash"],
        "summary": {name: summary[name] for name in KEPT if name in summary},
    }


def own_weights(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The model's tensors in the state of a training module, by the model's names."""
    return {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}


def _check_loads(
    directory: Path, written: PreTrainedModel, model: PreTrainedModel, trained: Mapping[str, torch.Tensor]
) -> None:
    """Check that every tensor was kept as training left it, and that plain transformers loads what was written."""
    dtype = model.dtype
    kind = auto_class(head_of(read_config(directory)))
    again = kind.from_pretrained(directory, dtype=dtype)
    if block := load_block(again, directory):
        block.to(dtype)
    loaded, kept = again.state_dict(), model.state_dict()
    differing = [
        *(name for name, value in trained.items() if not torch.equal(kept[name], value.to(kept[name].dtype))),
        *(
            name
            for name, value in written.state_dict().items()
            if name not in loaded or not torch.equal(loaded[name], value)
        ),
    ]
    if differing:
        raise OutputError(
            "the exported checkpoint does not load as what was trained",
            found=f"{len(differing)} tensors differ, first {differing[0]}",
            remedy="report this as a bug; nothing was written",
        )
