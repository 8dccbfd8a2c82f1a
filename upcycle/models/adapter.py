"""An adapter in a model's directory, which PEFT would apply and other readers would not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from upcycle.checkpoint import has_weights
from upcycle.errors import SourceError
from upcycle.files.json import object_or_empty

if TYPE_CHECKING:
    from pathlib import Path

ADAPTER: Final = "adapter_config.json"
_MERGE: Final = "PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(DIR)"


def check_no_adapter(directory: Path) -> None:
    """Check that a directory holds no adapter: whether it is part of the model is the user's to say.

    Raises:
        SourceError: one lies beside the model, or there is nothing but one.
    """
    file = directory / ADAPTER
    if not file.is_file():
        return
    if has_weights(directory):
        raise SourceError(
            "an adapter lies beside the model: transformers applies it where PEFT is installed, and not elsewhere",
            found=f"{file}, for {_base(file)}",
            expected="a model with its adapter merged into its weights, or without one",
            remedy=f"merge it with PEFT ({_MERGE}) and give DIR, or move {ADAPTER} and adapter_model.* "
            "to another directory",
        )
    raise SourceError(
        "the directory holds an adapter, not a model",
        found=f"{file}, for {_base(file)}",
        expected="a full model's directory",
        remedy=f"load its base model, merge it with PEFT ({_MERGE}), and give DIR",
    )


def _base(file: Path) -> str:
    name = object_or_empty(file).get("base_model_name_or_path")
    return f"base model {name}" if name else "a base model that it does not name"
