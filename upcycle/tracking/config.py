"""Options of the W&B mirror and of `upcycle sync`; the defaults are in `conf/`. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from upcycle.options.config import STRICT


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """`wandb.*`: the mirror of the record at Weights & Biases.

    Attributes:
        mode: online sends rows as they come; offline keeps them for `upcycle sync`; disabled has no mirror.
        project, entity: where the run goes; a null entity is the account's default.
        group: what runs of one question share, such as a sweep's name.
        tags: labels of the run.
        artifacts: also send the checkpoints, and the equivalence report if the source has one.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    mode: Literal["online", "offline", "disabled"]
    project: str
    entity: str | None
    group: str | None
    tags: list[str]
    artifacts: bool


@dataclass(frozen=True, kw_only=True)
class SyncConfig:
    """`upcycle sync`.

    Attributes:
        path: directory of a run, or one that holds runs.
        project, entity: of runs that have no mirror yet; null takes what they were started with.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    path: str
    project: str | None
    entity: str | None
