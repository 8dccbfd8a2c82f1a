"""Loads whatever is to be evaluated: any causal LM of transformers, dense or MoE, with its tokenizer, in float32."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn

from upcycle.errors import ConfigError, SourceError
from upcycle.load import load_dense, load_tokenizer, quietly
from upcycle.model_config import load_config
from upcycle.source import expanded, open_source

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_model(given: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model on the GPU if there is one, and its tokenizer.

    Args:
        given: directory of any causal LM, or GGUF file or Hub id of a dense model.

    Raises:
        SourceError: nothing there, not a causal LM, incomplete weights, or no tokenizer that belongs to it.
    """
    if expanded(given).is_dir():
        directory = expanded(given)
        model, tokenizer = _load(directory), _tokenizer(directory)
    else:
        source = open_source(given)
        model, tokenizer = load_dense(source), load_tokenizer(source)
    vocabulary = model.config.get_text_config().vocab_size
    if len(tokenizer) > vocabulary:
        raise SourceError(
            "the tokenizer has more tokens than the model",
            found=f"tokenizer {len(tokenizer)}, model {vocabulary}",
            remedy="take the tokenizer that belongs to the model",
        )
    nn.Module.to(model, "cuda" if torch.cuda.is_available() else "cpu")
    return model, tokenizer


def window_length(model: PreTrainedModel, asked: int | None, *, default: int) -> int:
    """Tokens that the model reads at once: those asked for, or as many as it has positions and `default` allows.

    Raises:
        ConfigError: less than one, or more than the model's positions.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if asked is None:
        return min(default, positions or default)
    if not 1 <= asked <= (positions or asked):
        raise ConfigError(
            "sequence_length is out of range", found=asked, expected=f"1 to {positions}, the model's positions"
        )
    return asked


def _load(directory: Path) -> PreTrainedModel:
    """A checkpoint in evaluation mode, every tensor of which must be there."""
    from transformers import AutoModelForCausalLM

    load_config(directory)
    try:
        with quietly():
            # transformers' loop over experts takes experts of every width.
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                directory, dtype=torch.float32, experts_implementation="eager", output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise SourceError(
            "the model cannot be loaded",
            found=f"{directory}: {' '.join(str(error).split()):.300}",
            expected="a causal language model that transformers loads",
        ) from error
    model: PreTrainedModel = loaded[0]
    missing = sorted(loaded[1]["missing_keys"])
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise SourceError(
            "the checkpoint lacks tensors",
            found=f"{directory} without {', '.join(missing[:5])}{more}",
            remedy="take the complete checkpoint",
        )
    model.eval()
    return model


def _tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError, KeyError) as error:
        raise SourceError(
            "the model has no tokenizer that transformers can load",
            found=directory,
            remedy="add the tokenizer files to the model's directory",
        ) from error
