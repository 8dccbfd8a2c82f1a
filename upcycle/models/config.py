"""Reads a checkpoint's config.json, with errors that say what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from upcycle.errors import SourceError
from upcycle.files.json import read_object
from upcycle.models.adapter import check_no_adapter

if TYPE_CHECKING:
    from pathlib import Path


def read_config(directory: Path) -> dict[str, Any]:
    """The content of config.json.

    Raises:
        SourceError: there is none, or it is not a JSON object; or an adapter lies there.
    """
    check_no_adapter(directory)
    try:
        return read_object(directory / "config.json", remedy="download it again")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise SourceError(
            "no config.json there",
            found=str(directory),
            expected="a checkpoint's directory",
            remedy="give the model's directory",
        ) from error


def load_config(directory: Path) -> Any:
    """The transformers configuration of a checkpoint.

    Raises:
        SourceError: config.json is missing, damaged, or not valid for its model_type.
    """
    read_config(directory)
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(directory)
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, OSError, StrictDataclassError) as error:
        raise SourceError(
            "config.json is not valid for its model_type",
            found=f"{directory / 'config.json'}: {' '.join(str(error).split())}",
            remedy="take config.json from the model's own files",
        ) from error
