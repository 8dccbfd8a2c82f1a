"""Opens a dense model (directory, GGUF file or Hub id): its config, its tensors' headers, and lazily their values."""

from __future__ import annotations

import logging
import os
import re
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from upcycle.arch.families import FAMILIES
from upcycle.arch.family import DenseModel, Shape, describe
from upcycle.arch.head import OFFSETS, REWARD
from upcycle.arch.targets import TARGETS
from upcycle.checkpoint import (
    TensorReader,
    code_from_name,
    gguf_config,
    has_weights,
    is_pointer,
    not_downloaded,
    open_reader,
    read_index_names,
)
from upcycle.errors import ConfigError, SourceError, did_you_mean
from upcycle.models.auxiliary import HUB
from upcycle.models.config import load_config, read_config
from upcycle.models.heads import head_bias, settle_reward, stored_head
from upcycle.models.matching import HEAD, match_names
from upcycle.models.moe import target_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

DTYPES = ("float32", "bfloat16", "float16")
FLOATING = ("F64", "F32", "BF16", "F16")
EXPERT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
QUANTISED = "hf_quant_config.json"  # ModelOpt's, beside a config.json that says nothing of it
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json")
_log = logging.getLogger("upcycle")


@dataclass(frozen=True, kw_only=True)
class DenseSource:
    """A dense model on disk.

    Attributes:
        given: what the user named.
        path: directory or GGUF file.
        model: the architecture with its sizes.
        reader: lazy reader; None when only config and index are there.
        stored: the model's tensor name -> the name in the files.
        buffers: names in the files of buffers that no model reads.
        left: name of every tensor for multi-token prediction that is to be left out, and why.
        bias: name in the files of a reward head's bias, which config.json takes.
    """

    given: str
    path: Path
    model: DenseModel
    reader: TensorReader | None
    stored: Mapping[str, str]
    buffers: tuple[str, ...]
    left: Mapping[str, str] = field(default_factory=dict)
    bias: str | None = None

    @property
    def is_gguf(self) -> bool:
        return self.path.suffix == ".gguf"

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that decides the weights and the config."""
        weights = self.reader.files if self.reader else ()
        return tuple(sorted({*weights, self.path if self.is_gguf else self.path / "config.json"}))

    @property
    def dropped(self) -> dict[str, str]:
        """Stored tensors that no conversion takes over, and why."""
        tied = [HEAD] if self.model.tied and HEAD in self.stored else []
        buffers = dict.fromkeys(self.buffers, "a buffer that the model computes anew")
        bias = {self.bias: f"in config.json, as {OFFSETS}"} if self.bias else {}
        return {**dict.fromkeys(tied, "tied to the embedding"), **bias, **buffers, **self.left}

    def without_ahead(self, why: str) -> DenseSource:
        """The same model without its layers for multi-token prediction, which no forward pass of it uses."""
        ahead, left = self.model.family.ahead, self.model.ahead_shapes()
        if ahead is None or not left:
            return self
        config = deepcopy(self.model.config)
        setattr(config, ahead.depths, 0)
        stored = {name: each for name, each in self.stored.items() if name not in left}
        return replace(self, model=replace(self.model, config=config), stored=stored, left=dict.fromkeys(left, why))

    def read(self, name: str) -> Tensor:
        """A tensor by the model's name for it."""
        if self.reader is None:
            raise SourceError("the weights are not here", found=str(self.path), remedy="download the weight files")
        return self.reader.read(self.stored[name])

    def dtypes(self, dtype: str) -> dict[str, str]:
        """Safetensors code of every tensor of the model once converted to `dtype` ("auto" keeps each tensor's own).

        Raises:
            ConfigError: an unknown dtype.
            SourceError: a tensor that is not stored in floating point.
        """
        if dtype != "auto" and dtype not in DTYPES:
            known = ("auto", *DTYPES)
            raise ConfigError(
                "unknown dtype", found=dtype, expected=", ".join(known), remedy=did_you_mean(dtype, known)
            )
        found = {name: self._stored_dtype(name) for name in self.model.tensors()}
        integers = {name: code for name, code in found.items() if code not in FLOATING}
        if integers:
            name, code = next(iter(integers.items()))
            raise SourceError(
                f"the source cannot give dtype={dtype}: its weights are not stored in a floating-point type we read",
                found=f"{name} is {code} (and {len(integers) - 1} more tensors)",
                expected=", ".join(FLOATING),
                remedy="dequantise the model and save it in bfloat16 first",
            )
        return found if dtype == "auto" else dict.fromkeys(found, code_from_name(dtype))

    def _stored_dtype(self, name: str) -> str:
        if self.reader is None:
            return code_from_name(str(self.model.config.dtype or "float32").removeprefix("torch."))
        return self.reader.tensors[self.stored[name]].dtype


def open_source(given: str, *, need_weights: bool = True) -> DenseSource:
    """Open a dense model.

    Args:
        given: directory, GGUF file or Hub id.
        need_weights: False accepts a directory that holds only config.json, with or without an index.

    Raises:
        SourceError: nothing there, not a dense model of a known family, quantised, or tensors unfit for the config.
    """
    path = _resolve(given, need_weights=need_weights)
    config = _gguf_config(path) if path.suffix == ".gguf" else _directory_config(path)
    reader, shapes = _headers(path, need_weights=need_weights)
    head = stored_head(config, shapes)
    bias = head_bias(shapes) if head is REWARD else None
    if head is REWARD:
        settle_reward(config, shapes, reader.read if reader else None)
    model = describe(FAMILIES[config.model_type], config, head)
    own = {name: shape for name, shape in shapes.items() if name != bias} or dict.fromkeys(model.tensors())
    stored = match_names(model, own, unlisted=reader.unlisted if reader else frozenset())
    if reader is not None and _holds_another_head(model, stored, reader):
        _log.warning(
            "%s: config.json ties the head to the embedding, and the files hold another head; both are kept, as in "
            "transformers, and what is written says tie_word_embeddings=false",
            path,
        )
        config.tie_word_embeddings = False
    if config.tie_word_embeddings and not model.family.ties_embeddings:
        _log.warning(
            "%s: config.json ties the head to the embedding, which transformers never does for %s; "
            "what is written says tie_word_embeddings=false",
            path,
            model.family.model_type,
        )
        config.tie_word_embeddings = False
    buffers = tuple(sorted(set(own) - set(stored.values())))
    return DenseSource(given=given, path=path, model=model, reader=reader, stored=stored, buffers=buffers, bias=bias)


def _headers(path: Path, *, need_weights: bool) -> tuple[TensorReader | None, dict[str, Shape | None]]:
    """The reader, and the shape of every stored tensor; both empty where there are neither weights nor an index."""
    if need_weights or path.suffix == ".gguf" or has_weights(path):
        reader = open_reader(path)
        return reader, {name: info.shape for name, info in reader.tensors.items()}
    return None, dict.fromkeys(read_index_names(path) or ())


def _holds_another_head(model: DenseModel, stored: Mapping[str, str], reader: TensorReader) -> bool:
    """Whether the files hold a head that config.json ties to the embedding, and it differs: transformers keeps it."""
    head, embedding = stored.get(HEAD), stored[model.family.embedding]
    if not model.tied or head in (None, embedding):
        return False
    values = reader.read(str(head)), reader.read(embedding)
    common = torch.promote_types(values[0].dtype, values[1].dtype)
    return not torch.equal(values[0].to(common), values[1].to(common))


def expanded(path: str) -> Path:
    """A path with `~` expanded, which shells do not always do after `=`; an unknown user's stays as it is."""
    return Path(os.path.expanduser(path))


def _resolve(given: str, *, need_weights: bool) -> Path:
    path = expanded(given)
    if path.is_file() and is_pointer(path):
        raise not_downloaded(path)
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.is_file():
        raise SourceError(
            "source is a file that is not GGUF", found=given, expected="a directory, a .gguf file or a Hub id"
        )
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", given) or given.startswith("."):
        raise SourceError(
            "source does not exist",
            found=given,
            expected="a directory, a .gguf file or a Hub id such as HuggingFaceTB/SmolLM2-135M",
        )
    return _download(given, need_weights=need_weights)


def _download(hub_id: str, *, need_weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["config.json", QUANTISED, "*.index.json", *HUB, *(WEIGHTS if need_weights else ())]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise SourceError(
            "the Hub model could not be had",
            found=f"{hub_id}: {str(error).splitlines()[0]}",
            remedy="check the name and the connection (HF_HUB_OFFLINE, HF_TOKEN), or give a local directory",
        ) from error


def _directory_config(path: Path) -> Any:
    _check_raw(read_config(path))
    if (path / QUANTISED).exists():
        raise SourceError(
            "the source is quantised",
            found=str(path / QUANTISED),
            expected="float32, bfloat16 or float16 weights",
            remedy="take the model that was quantised",
        )
    return load_config(path)


def _gguf_config(path: Path) -> Any:
    from transformers import AutoConfig

    raw = gguf_config(path)
    _check_raw(raw)
    return AutoConfig.for_model(**raw)


def _check_raw(raw: Mapping[str, Any]) -> None:
    model_type = raw.get("model_type")
    experts = {name: raw[name] for name in EXPERT_FIELDS if isinstance(raw.get(name), int) and raw[name] > 1}
    if target_of(raw) or (experts and model_type not in TARGETS):
        raise SourceError(
            "the source is already a mixture of experts",
            found=f"model_type={model_type} {experts or ''}".rstrip(),
            expected="a dense model",
            remedy="give the dense model; `upcycle inspect` shows what this one is",
        )
    if raw.get("quantization_config"):
        quantisation = raw["quantization_config"]
        method = quantisation.get("quant_method", "unknown") if isinstance(quantisation, dict) else quantisation
        raise SourceError(
            "the source is quantised",
            found=f"quantization_config with quant_method={method}",
            expected="float32, bfloat16 or float16 weights",
            remedy="load it in transformers, call dequantize(), and save it",
        )
    inner = raw.get("text_config")
    if model_type not in FAMILIES and isinstance(inner, dict):
        raise SourceError(
            "the source is a model of several kinds of input",
            found=f"model_type={model_type} around a language model of model_type={inner.get('model_type')}",
            expected="the language model alone",
            remedy="save it by itself: `text = AutoModelForCausalLM.from_config(whole.config.text_config)`, then its "
            "`model` and `lm_head` taken from `whole`, then `text.save_pretrained(DIR)`",
        )
    if model_type not in FAMILIES:
        raise SourceError(
            "unknown dense architecture",
            found=f"model_type={model_type}",
            expected=", ".join(sorted(FAMILIES)),
            remedy=did_you_mean(str(model_type), FAMILIES),
        )
