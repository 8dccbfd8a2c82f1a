"""Options of `upcycle evaluate`; the defaults are in `conf/`. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from upcycle.data.config import DataConfig  # noqa: TC001 (pydantic reads the annotations)
from upcycle.options.config import STRICT


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """`upcycle evaluate`.

    Attributes:
        model: directory of any causal language model or reward model; or GGUF file or Hub id of a dense one.
        data: the text, or for a reward model the texts with attributes, of which the held-out part is used.
        sequence_length: tokens per window; null takes the model's positions, at most 1024.
        tokens: held-out tokens to use of each domain, rounded down to whole windows; null takes all.
        mtp_depths: how many tokens after the next one a model with layers for multi-token prediction guesses.
        tasks: names of tasks of the lm-evaluation-harness.
        output: JSON file to write the result to.
        format: table or json.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    model: str
    data: DataConfig
    sequence_length: int | None
    tokens: int | None
    mtp_depths: int
    tasks: list[str]
    output: str | None
    format: str
