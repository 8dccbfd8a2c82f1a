"""The four arms: go on with the dense model, upcycle it in memory, start from random weights, load a checkpoint."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from upcycle.arch.families import FAMILIES
from upcycle.arch.head import CAUSAL, REWARD, head_of
from upcycle.arch.targets import TARGETS
from upcycle.checkpoint import hash_files
from upcycle.convert.manifest import manifest_json
from upcycle.convert.materialise import Materialiser
from upcycle.convert.prepare import prepare
from upcycle.convert.run import output_config
from upcycle.convert.slices import SlicedTensor, SliceMaterialiser
from upcycle.data.bytes_tokenizer import byte_tokenizer
from upcycle.distributed.model import check_units, laid_out, settle
from upcycle.distributed.quiet import only_errors
from upcycle.distributed.ranks import ALONE
from upcycle.errors import ConfigError, UpcycleError, did_you_mean
from upcycle.models.config import read_config
from upcycle.models.heads import auto_class, class_of, draw_head, settle_padding
from upcycle.models.load import (
    check_fits,
    from_pretrained,
    load_checkpoint,
    load_dense,
    load_tokenizer,
    load_tokenizer_from,
    quietly,
)
from upcycle.models.manifest import read_manifest
from upcycle.models.moe import describe_config, describe_moe, planned_groups, regrouped, target_of
from upcycle.models.padding import without_padding
from upcycle.models.source import expanded, open_source
from upcycle.options.config import ConvertConfig
from upcycle.parallel.rank_layout import check_experts, check_heads
from upcycle.train.ahead import settle_ahead
from upcycle.train.heads import new_head
from upcycle.train.objectives.choose import kind_of
from upcycle.train.start import Start

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from upcycle.arch.head import Head
    from upcycle.convert.prepare import Conversion
    from upcycle.distributed.ranks import Ranks
    from upcycle.models.moe import MoeDescription
    from upcycle.models.source import DenseSource
    from upcycle.parallel.rank_layout import RankLayout
    from upcycle.train.config import TrainConfig

BYTES = "bytes"


def start_model(config: TrainConfig, ranks: Ranks = ALONE) -> Start:
    """Build the model that `config` names, on every rank its shard.

    Raises:
        ConfigError: options that do not go together, or with the model.
        SourceError: the source cannot be read.
    """
    _check_options(config, ranks)
    arms = {"dense": _dense, "upcycle": _upcycle, "scratch": _scratch, "checkpoint": _checkpoint}
    torch.manual_seed(config.seed)
    scored = kind_of(config).attributes(config)
    # Transformers would report the head that is left out and the one that is new.
    with quietly(), only_errors("transformers") if scored else nullcontext():
        start = arms[config.model](config, ranks)
    if ranks.size > 1:
        check_layout(start, ranks.layout)
        if ranks.layout.data > 1:
            check_units(start.model)
        settle(start.model)
    start = settle_ahead(start, config.mtp, ranks, seed=config.seed)
    if scored:
        settle_padding(start.model, start.tokenizer)
    start.model.train()
    check_fits(start.model, start.tokenizer, config.sequence_length)
    return start


def check_layout(start: Start, layout: RankLayout) -> None:
    """Check that ranks can share a model so.

    Raises:
        ConfigError: its heads or its experts do not go into the layout.
    """
    text = start.model.config.get_text_config()
    heads, experts = getattr(text, "num_key_value_heads", None) or text.num_attention_heads, None
    if start.moe:
        experts = start.moe.experts
        check_experts(layout, experts)
    check_heads(layout, heads, experts)


def _check_options(config: TrainConfig, ranks: Ranks) -> None:
    measures = {"init.scaling=calibrated": config.init.scaling, "init.latent=compress": config.init.latent}
    asked = [option for option, value in measures.items() if option.endswith(f"={value}")]
    if config.model == "upcycle" and asked and ranks.size > 1:
        raise ConfigError(
            f"{' and '.join(asked)} measures the dense model whole, which a rank need not be able to hold",
            found=f"{ranks.size} ranks",
            remedy="convert first, and train with model=checkpoint",
        )
    if config.model != "scratch" and config.architecture is not None:
        raise ConfigError(
            "architecture is for model=scratch", found=f"model={config.model}", remedy="leave architecture out"
        )
    if config.source is None and (config.model != "scratch" or config.architecture is None):
        raise ConfigError(
            f"model={config.model} needs a source",
            found="source=null",
            expected="source=MODEL" + (" or architecture={...}" if config.model == "scratch" else ""),
            remedy="give the dense model, or for model=checkpoint the directory to train",
        )
    if config.source is None and config.tokenizer is None:
        raise ConfigError(
            "a model without a source needs a tokenizer",
            found="tokenizer=null",
            expected="a directory, a Hub id, or bytes",
            remedy="add tokenizer=bytes",
        )


def _dense(config: TrainConfig, ranks: Ranks) -> Start:
    source = open_source(str(config.source))
    _check_sliceable(source, ranks)
    made = _new_head(config, source.model.config, source.model.head)
    with laid_out(replace(ranks.layout, ep=1)) as layout:
        model = load_dense(source, new_head=made, **layout)
    if made:
        draw_head(model, seed=config.seed)
    tokenizer = _tokenizer(config, source)
    return Start(model=model, tokenizer=tokenizer, moe=None, source=source, origin=source.path, manifest={})


def _upcycle(config: TrainConfig, ranks: Ranks) -> Start:
    request = conversion_request(config)
    conversion = prepare(request, execute=True)
    check_experts(ranks.layout, conversion.plan.moe.experts)
    hashes = hash_files(conversion.source.files if ranks.main else ())
    head, transformers_config = conversion.source.model.head, _transformers_config(output_config(conversion))
    made = _new_head(config, transformers_config, head)
    kind = class_of(REWARD if made else head, made or transformers_config)
    tensors = [each for each in conversion.plan.tensors if not (made and each.name.endswith(head.tensor))]
    if ranks.size == 1:
        materialiser = Materialiser(conversion.source.read, config.seed, conversion.bases)
        values = {tensor.name: materialiser.tensor(tensor, torch.float32) for tensor in tensors}
        model, bytes_read = _filled(kind, made or transformers_config, values, fresh=bool(made)), None
    else:
        _check_sliceable(conversion.source, ranks)
        shapes = conversion.source.model.tensors()
        slicing = SliceMaterialiser(conversion.source.read, config.seed, shapes, conversion.bases)
        slices = {tensor.name: SlicedTensor(tensor, slicing) for tensor in tensors}
        with laid_out(ranks.layout) as layout:
            model = _filled(kind, made or transformers_config, slices, fresh=bool(made), **layout)
        bytes_read = slicing.bytes_read
    if made:
        draw_head(model, seed=config.seed)
    manifest = json.loads(manifest_json(conversion, request, hashes.result()))
    return replace(_of_conversion(config, conversion, model, manifest), bytes_read=bytes_read)


def _check_sliceable(source: DenseSource, ranks: Ranks) -> None:
    files = source.reader.files if source.reader else ()
    others = sorted(file.name for file in files if file.suffix != ".safetensors")
    if ranks.size > 1 and others:
        raise ConfigError(
            "only of safetensors files can every rank read what its shard needs",
            found=", ".join(others[:3]),
            remedy="save the model as safetensors first, with save_pretrained of transformers",
        )


def _scratch(config: TrainConfig, ranks: Ranks) -> Start:
    if config.architecture is not None:
        return _from_architecture(config, config.architecture, ranks)
    conversion = prepare(conversion_request(config), execute=False)
    check_experts(ranks.layout, conversion.plan.moe.experts)
    head, transformers_config = conversion.source.model.head, _transformers_config(output_config(conversion))
    made = _new_head(config, transformers_config, head)
    model = _random(made or transformers_config, REWARD if made else head, ranks)
    return _of_conversion(config, conversion, model, planned_groups(conversion.plan))


def _from_architecture(config: TrainConfig, architecture: dict[str, Any], ranks: Ranks) -> Start:
    source = open_source(config.source, need_weights=False) if config.source else None
    tokenizer = _tokenizer(config, source)
    model_type = architecture.get("model_type")
    known = sorted({*FAMILIES, *(name for name, target in TARGETS.items() if not target.generic)})
    if model_type not in known:
        raise ConfigError(
            "unknown architecture",
            found=f"model_type={model_type}",
            expected=", ".join(known),
            remedy=did_you_mean(str(model_type), known),
        )
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    fields = {"vocab_size": len(tokenizer), **special, **architecture}
    from huggingface_hub.errors import StrictDataclassError

    try:
        transformers_config = _transformers_config(fields)
        made = _new_head(config, transformers_config, CAUSAL)
        model = _random(made or transformers_config, REWARD if made else CAUSAL, ranks)
    except UpcycleError:
        raise
    except (ValueError, TypeError, ArithmeticError, StrictDataclassError) as error:
        raise ConfigError("architecture is not valid", found=" ".join(str(error).split())) from error
    target = target_of(model.config.to_dict())
    moe = describe_config(target, model.config, None) if target else None
    return Start(model=model, tokenizer=tokenizer, moe=moe, source=None, origin=None, manifest={})


def _checkpoint(config: TrainConfig, ranks: Ranks) -> Start:
    directory = expanded(str(config.source))
    if target_of(read_config(directory)) is None:
        return _dense(config, ranks)
    moe = regrouped(describe_moe(directory), config.moe.groups)
    check_experts(ranks.layout, moe.experts)
    manifest = read_manifest(directory) or {}
    stored = without_padding(directory, moe.target)
    made = _new_head(config, stored, head_of(stored.to_dict()))
    with laid_out(ranks.layout) as layout, only_errors("transformers"):
        own = {"config": stored, "ignore_mismatched_sizes": True}
        model = load_checkpoint(directory, new_head=made, **layout | own)
    if made:
        draw_head(model, seed=config.seed)
    origin = manifest.get("source", {}).get("given")
    source = open_source(origin) if origin and Path(origin).expanduser().exists() else None
    tokenizer = _tokenizer(config, directory)
    return Start(model=model, tokenizer=tokenizer, moe=moe, source=source, origin=directory, manifest=manifest)


def conversion_request(config: TrainConfig) -> ConvertConfig:
    """The `upcycle convert` that model=upcycle and model=scratch stand for."""
    return ConvertConfig(
        source=str(config.source),
        output="",
        target=config.target,
        portable=False,
        mtp="none",
        dtype="float32",
        seed=config.seed,
        max_shard_size="5GB",
        workers=1,
        calibration_tokens=config.calibration_tokens,
        moe=config.moe,
        init=config.init,
        overwrite=False,
        resume=False,
        part=None,
        verify=False,
    )


def dense_shards(source: DenseSource, moe: MoeDescription, request: ConvertConfig) -> Conversion:
    """The conversion to one group of unscaled experts: expert g is shard g of the dense FFN."""
    granularity, dense = moe.granularity, source.model
    part = dense.ffn_width - granularity * moe.expert_width
    one_group = replace(
        request.moe,
        expansion=1,
        granularity=granularity,
        top_k=granularity,
        router_order="softmax_topk",
        shared_experts=0,
        shared_neurons=part or None,
        layers=[dense.ffn_layers.index(layer) for layer in moe.layers],
        groups="free",
        latent=None,
    )
    init = replace(request.init, name="virtual_group", scaling="none", latent="exact")
    return prepare(replace(request, source=source.given, target="upcycled_moe", moe=one_group, init=init), execute=True)


def _of_conversion(
    config: TrainConfig, conversion: Conversion, model: PreTrainedModel, manifest: dict[str, Any]
) -> Start:
    return Start(
        model=model,
        tokenizer=_tokenizer(config, conversion.source),
        moe=describe_config(TARGETS[conversion.plan.target], model.config, manifest),
        source=conversion.source,
        origin=conversion.source.path,
        manifest=manifest,
    )


def _transformers_config(fields: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(**fields)


def _new_head(config: TrainConfig, own: Any, head: Head) -> Any | None:
    """The transformers configuration of a model with a new reward head; None where it keeps its own."""
    return new_head(own, head, kind_of(config).attributes(config))


def _filled(kind: Any, transformers_config: Any, values: Mapping[str, Any], **more: Any) -> PreTrainedModel:
    return from_pretrained(kind, None, config=transformers_config, state_dict=values, dtype=torch.float32, **more)


def _random(transformers_config: Any, head: Head, ranks: Ranks) -> PreTrainedModel:
    """Random weights; with several ranks, each draws all of them and keeps its shard."""
    model: PreTrainedModel = auto_class(head).from_config(transformers_config, dtype=torch.float32)
    if ranks.size == 1:
        return model
    dense = target_of(transformers_config.to_dict()) is None
    with laid_out(replace(ranks.layout, ep=1) if dense else ranks.layout) as layout:
        return _filled(class_of(head, transformers_config), transformers_config, model.state_dict(), **layout)


def _tokenizer(config: TrainConfig, source: DenseSource | Path | None) -> PreTrainedTokenizerBase:
    if config.tokenizer == BYTES:
        return byte_tokenizer()
    if config.tokenizer is not None:
        return load_tokenizer_from(config.tokenizer)
    assert source is not None
    return load_tokenizer_from(source) if isinstance(source, Path) else load_tokenizer(source)
