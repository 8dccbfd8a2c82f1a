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
TOKENS_PER_FILE = 2048


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


def library_tokens(source: DenseSource, *, tokens: int) -> torch.Tensor:
    """Token ids of the standard library without `DEFAULT_TEXT`, at most the first `TOKENS_PER_FILE` of a module.

    What is fit on these can be tested on that. Modules are taken by name until there are `tokens`.

    Raises:
        ConfigError: there are fewer.
    """
    tokenizer, found = load_tokenizer(source), list[int]()
    for file in sorted(DEFAULT_TEXT.parent.glob("[a-z]*.py")):
        if file != DEFAULT_TEXT and len(found) < tokens:
            ids = tokenizer(file.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
            found += ids[: min(TOKENS_PER_FILE, tokens - len(found))]
    if len(found) < tokens:
        raise ConfigError(
            "calibration_tokens asks for more text than there is", found=tokens, expected=f"at most {len(found)}"
        )
    return torch.tensor(found)
