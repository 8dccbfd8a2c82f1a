"""Loads dense and MoE checkpoints through transformers, and finds their FFN blocks."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch

from upcycle.errors import SourceError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from upcycle.source import DenseSource


def load_dense(source: DenseSource, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The dense model in evaluation mode."""
    from transformers import AutoModelForCausalLM

    model: PreTrainedModel
    if source.is_gguf:
        model = AutoModelForCausalLM.from_config(source.model.config, dtype=dtype)
        model.load_state_dict({name: source.read(name) for name in source.model.tensors()}, strict=False)
        model.tie_weights()
    else:
        with quietly():
            model = AutoModelForCausalLM.from_pretrained(source.path, dtype=dtype)
    model.eval()
    return model


def load_moe(directory: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A MoE checkpoint in evaluation mode, with transformers' loop over experts, which takes every width."""
    from transformers import AutoModelForCausalLM

    with quietly():
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, experts_implementation="eager"
        )
    model.eval()
    return model


def load_tokenizer(source: DenseSource) -> PreTrainedTokenizerBase:
    """The dense model's tokenizer.

    Raises:
        SourceError: the source has none.
    """
    from transformers import AutoTokenizer

    directory, options = _gguf_arguments(source)
    try:
        return AutoTokenizer.from_pretrained(directory, **options)
    except (OSError, ValueError, KeyError) as error:
        raise SourceError(
            "the source has no tokenizer that transformers can load",
            found=str(source.path),
            remedy="add the tokenizer files to the source directory",
        ) from error


def ffn_modules(model: nn.Module, path: str, layers: Iterable[int]) -> dict[int, nn.Module]:
    """The FFN (or MoE block) of each layer; `path` has `{layer}` left open."""
    return {layer: reduce(getattr, path.format(layer=layer).split("."), model) for layer in layers}


def _gguf_arguments(source: DenseSource) -> tuple[Path, dict[str, Any]]:
    if source.is_gguf:
        return source.path.parent, {"gguf_file": source.path.name}
    return source.path, {}


@contextmanager
def quietly() -> Iterator[None]:
    """Without transformers' progress bars, and without torch's word on qwen2_moe's shared expert of width 0."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Initializing zero-element tensors is a no-op")
            yield
    finally:
        if shown:
            logging.enable_progress_bar()
