"""Loads whatever is to be evaluated: any causal LM of transformers, dense or MoE, with its tokenizer, in float32."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from upcycle.models.ahead import load_block
from upcycle.models.load import check_fits, load_checkpoint, load_dense, load_tokenizer, load_tokenizer_from
from upcycle.models.source import expanded, open_source

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LONGEST_BY_DEFAULT = 1024


def load_model(given: str, *, sequence_length: int | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, int]:
    """A model on the GPU if there is one, its tokenizer, and the tokens that it reads at once.

    Args:
        given: directory of any causal LM, or GGUF file or Hub id of a dense model.
        sequence_length: tokens to read at once; None takes the model's positions, at most `LONGEST_BY_DEFAULT`.

    Raises:
        SourceError: nothing there, not a causal LM, incomplete weights, or no tokenizer.
        ConfigError: a tokenizer of another model, or more tokens than positions.
    """
    if expanded(given).is_dir():
        model, tokenizer = load_checkpoint(expanded(given)), load_tokenizer_from(expanded(given))
        load_block(model, expanded(given))
    else:
        source = open_source(given)
        model, tokenizer = load_dense(source), load_tokenizer(source)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    length = (
        sequence_length if sequence_length is not None else min(LONGEST_BY_DEFAULT, positions or LONGEST_BY_DEFAULT)
    )
    check_fits(model, tokenizer, length)
    nn.Module.to(model, "cuda" if torch.cuda.is_available() else "cpu")
    return model, tokenizer, length
