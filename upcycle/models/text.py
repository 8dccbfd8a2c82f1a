"""The text that calibration and verification measure on."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from upcycle.errors import ConfigError
from upcycle.models.load import load_tokenizer

if TYPE_CHECKING:
    from upcycle.models.source import DenseSource

DEFAULT_TEXT = Path(argparse.__file__)


def sample_tokens(source: DenseSource, *, tokens: int, file: Path = DEFAULT_TEXT) -> torch.Tensor:
    """The first `tokens` token ids of a text file, [tokens].

    Raises:
        ConfigError: the file cannot be read as UTF-8, or has fewer than two tokens.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("the text cannot be read", found=f"{file}: {error}", expected="a UTF-8 file") from error
    ids = load_tokenizer(source)(text, add_special_tokens=False, verbose=False)["input_ids"][:tokens]
    if len(ids) < 2:
        raise ConfigError("the text is too short", found=f"{file}: {len(ids)} tokens", expected="at least 2 tokens")
    return torch.tensor(ids)
