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
# Kind of rows with attributes -> the attributes that it has; those of `attributes` are columns that the user names.
RATED: dict[str, tuple[str, ...]] = {
    "attributes": (),
    "textblob": ("polarity", "subjectivity"),
    "vader": ("valence", "deviation"),
}


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
    """`data.*`; `name` may also be mixture, or for texts with attributes: attributes, textblob or vader.

    Attributes:
        domains: mixture: its domains by name.
        attributes: attributes: the columns with a number for each attribute; textblob, vader: which of theirs to take,
            null for all.
        held_out: documents of each domain kept from training: a number (>= 1), a fraction (< 1), or 0 for none.
        document_attention: let no token attend to another document of its window.
        cache_dir: directory of the token cache; null takes `$XDG_CACHE_HOME/upcycle/data` (`~/.cache/upcycle/data`).
    """

    domains: dict[str, DomainConfig] | None = None
    attributes: list[str] | None = None
    held_out: int | float = 20
    document_attention: bool = False
    cache_dir: str | None = None

    def sources(self) -> dict[str, SourceConfig]:
        """The checked sources by domain; the single source of what is no mixture is a domain of its own.

        Raises:
            ConfigError: an unknown kind, a field that its kind does not have, no domains, or a weight <= 0; rows with
                attributes instead of text.
        """
        if self.name in RATED:
            raise ConfigError(
                f"data={self.name} has texts with attributes, which train and measure reward models alone",
                found=f"data={self.name}",
                expected=f"text: {', '.join((*KINDS, MIXTURE))}",
                remedy="set objective=regression to train a reward model, or data=text",
            )
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

    def rated(self) -> tuple[str, ...]:
        """The attributes of texts that have some.

        Raises:
            ConfigError: text without attributes, none named, unknown ones, or a field that the kind does not have.
        """
        if self.name not in RATED:
            raise ConfigError(
                "a reward model needs texts with attributes",
                found=f"data={self.name}",
                expected=f"data={', '.join(RATED)}",
                remedy="set data=attributes with data.files and data.attributes, or objective=causal_lm to train on "
                "text",
            )
        own = RATED[self.name]
        _check(self, "data", extra=("held_out", "attributes", *(() if own else ("files", "field"))))
        names = tuple(self.attributes or own)
        if not names:
            raise ConfigError("data=attributes needs the names of its attributes", expected="data.attributes=[…]")
        strange = [name for name in names if own and name not in own]
        if strange or len(set(names)) < len(names):
            raise ConfigError(
                "data.attributes does not name attributes of the data, each once",
                found=", ".join(names),
                expected=", ".join(own) or "different columns",
            )
        return names

    def weights(self) -> dict[str, float]:
        """Weights of the domains of `sources`."""
        return {name: getattr(source, "weight", 1.0) for name, source in self.sources().items()}


def _check(source: SourceConfig, where: str, *, extra: tuple[str, ...]) -> None:
    """Reject a kind that there is not, and fields that would be ignored."""
    mixed = where == "data" and source.name == MIXTURE
    rated = where == "data" and source.name in RATED
    if source.name not in KINDS and not (mixed or rated):
        raise ConfigError(
            f"unknown kind of data for {where}",
            found=source.name,
            expected=near_misses(source.name, [*KINDS, MIXTURE, *RATED]),
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
