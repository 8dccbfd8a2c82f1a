"""Options `data.*` as frozen dataclasses; the defaults of the command line are in `conf/data/`. Not torch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

from upcycle.errors import ConfigError, near_misses
from upcycle.options.config import STRICT

# Kind of source -> the fields of a SourceConfig that say something about it.
KINDS = {
    "python_stdlib": (),
    "text": ("files", "field"),
    "hf": ("path", "subset", "split", "field", "streaming", "max_documents"),
}
MIXTURE = "mixture"


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Where documents come from; `name` says which of the other fields apply.

    Attributes:
        name: python_stdlib, text or hf.
        files: text: a path or glob, or several; .jsonl, .ndjson, .json, .csv, .tsv and .parquet hold a document per
            row, others are one document; .gz, .bz2, .xz and .zst of either are decompressed.
        field: text (of rows) and hf: the column that holds the document.
        path: hf: name or directory, as for `datasets.load_dataset`, or what `save_to_disk` wrote.
        subset: hf: name of the dataset's configuration.
        split: hf: split to read.
        streaming: hf: read without downloading everything; needs `max_documents`.
        max_documents: hf: read only the first so many.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    name: str
    files: str | list[str] | None = None
    field: str = "text"
    path: str | None = None
    subset: str | None = None
    split: str = "train"
    streaming: bool = False
    max_documents: int | None = None


@dataclass(frozen=True, kw_only=True)
class DomainConfig(SourceConfig):
    """A domain of a mixture.

    Attributes:
        weight: share of the training samples, relative to the other domains'.
    """

    weight: float


@dataclass(frozen=True, kw_only=True)
class DataConfig(SourceConfig):
    """`data.*`; `name` may also be mixture.

    Attributes:
        domains: mixture: its domains by name.
        held_out: documents of each domain kept from training: a number (>= 1), a fraction (< 1), or 0 for none.
        document_attention: let no token attend to another document of its window.
        cache_dir: directory of the token cache; null takes `$XDG_CACHE_HOME/upcycle/data` (`~/.cache/upcycle/data`).
    """

    domains: dict[str, DomainConfig] | None = None
    held_out: int | float = 20
    document_attention: bool = False
    cache_dir: str | None = None

    def sources(self) -> dict[str, SourceConfig]:
        """The checked sources by domain; the single source of what is no mixture is a domain of its own.

        Raises:
            ConfigError: an unknown kind, a field that its kind does not have, no domains, or a weight <= 0.
        """
        if self.name != MIXTURE:
            _check(self, "data", extra=("held_out", "document_attention", "cache_dir"))
            return {"python" if self.name == "python_stdlib" else self.name: self}
        if not self.domains:
            raise ConfigError(
                "a mixture needs domains", found="none", expected="data.domains.NAME={name: …, weight: …}"
            )
        _check(self, "data", extra=("domains", "held_out", "document_attention", "cache_dir"))
        for name, domain in self.domains.items():
            _check(domain, f"data.domains.{name}", extra=("weight",))
            if not domain.weight > 0:
                raise ConfigError(
                    f"data.domains.{name}.weight is not positive",
                    found=domain.weight,
                    expected="a number greater than 0",
                    remedy="leave out a domain that should not be used",
                )
        return dict(self.domains)

    def weights(self) -> dict[str, float]:
        """Weights of the domains of `sources`."""
        return {name: getattr(source, "weight", 1.0) for name, source in self.sources().items()}


def _check(source: SourceConfig, where: str, *, extra: tuple[str, ...]) -> None:
    """Reject a kind that there is not, and fields that would be ignored."""
    mixed = where == "data" and source.name == MIXTURE
    if source.name not in KINDS and not mixed:
        raise ConfigError(
            f"unknown kind of data for {where}", found=source.name, expected=near_misses(source.name, [*KINDS, MIXTURE])
        )
    allowed = {"name", *extra, *KINDS.get(source.name, ())}
    for field in fields(source):
        if field.name not in allowed and getattr(source, field.name) != field.default:
            raise ConfigError(
                f"{where}.{field.name} does not apply to {source.name}",
                found=getattr(source, field.name),
                expected=", ".join(sorted(allowed - {"name"})),
                remedy="leave it out",
            )
