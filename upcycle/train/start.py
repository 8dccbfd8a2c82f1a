"""What training starts from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from upcycle.models.moe import MoeDescription
    from upcycle.models.source import DenseSource


@dataclass(frozen=True, kw_only=True)
class Start:
    """What training starts from.

    Attributes:
        model: in float32, in training mode.
        tokenizer: the model's.
        moe: its shape; None for a dense model.
        source: the dense model that it came from, or that it is; None where there is none.
        origin: directory or GGUF file of the model, whose files beside config and weights belong to it; None where only
            the tokenizer does.
        manifest: what `upcycle convert` would have written about it, or the checkpoint's own; empty where neither is.
        bytes_read: by this rank, of the source's weights, where each rank reads what its shard needs.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    moe: MoeDescription | None
    source: DenseSource | None
    origin: Path | None
    manifest: dict[str, Any]
    bytes_read: int | None = None
