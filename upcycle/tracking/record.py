"""The record of a run on disk: run.json, metrics.jsonl, and what is needed to go on or to export.

DIR/run.json         resolved config, manifest, versions, hardware, data, status
DIR/metrics.jsonl    one row per logging interval and validation
DIR/metrics.arrow    the same as columns, of a finished run
DIR/checkpoints/     last.ckpt, best.ckpt: files, or of several ranks directories of shards
DIR/model/           config.json and tokenizer
DIR/wandb/           what the client of W&B keeps, such as offline runs
DIR/.lock            held by the process that trains or sends the run
"""

from __future__ import annotations

import json
import os
import shutil
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from upcycle.errors import ConfigError, OutputError, RecordError, SourceError
from upcycle.files.durable import output_errors, write_all, write_text
from upcycle.files.json import parse_json, read_object
from upcycle.tracking.schema import SCHEMA_VERSION
from upcycle.tracking.versions import upgraded

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from typing import Self

RUN, METRICS, CHECKPOINTS, MODEL = "run.json", "metrics.jsonl", "checkpoints", "model"
# What run.json of a training run has, whatever its schema's version.
KNOWN_BY = ("config", "order_hash", "data_hash", "flops_per_step")
# Options that change where a run is and what is seen of it, but no number in it.
NOT_COMPARED = (
    *("output", "resume", "overwrite", "progress", "workers", "checkpoint_every", "peak_flops", "wandb", "parallel"),
)


class Record:
    """The directory of a run.

    Args:
        directory: the run's.
        overwrite: delete what is there on `create`.
    """

    def __init__(self, directory: Path, *, overwrite: bool = False) -> None:
        self.directory = directory
        self.overwrite = overwrite
        self.last: dict[str, Any] = {}
        self._content: dict[str, Any] = {}

    @classmethod
    def open(cls, directory: Path, options: Mapping[str, Any], *, overwrite: bool, resume: bool) -> Self:
        """Check that a run can be written to the directory, or that it holds one to go on with.

        Args:
            directory: the run's.
            options: of the run, as run.json will have them.
            overwrite: an earlier run may be deleted.
            resume: an earlier run with the same options may be gone on with.

        Raises:
            OutputError: something is there that may not be replaced.
            RecordError: what is there is another project's, or to go on with and of another version of the schema.
            SourceError: its run.json is damaged.
            ConfigError: the run that is there was started with other options.
        """
        known = (directory / RUN).is_file()
        record = cls(directory, overwrite=overwrite and known)
        if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
            return record
        if not known or not (overwrite or resume):
            raise OutputError(
                f"the output {directory} exists already",
                expected="a new directory",
                remedy="go on with it with resume=auto, delete it with overwrite=true, or choose another output"
                if known
                else "choose another output: this is no run, which could be gone on with or deleted",
            )
        before = read_run(directory)
        check_training_run(before, directory)
        if not record.overwrite:
            check_schema(before, directory)
            _check_same(before["config"], json.loads(json.dumps(options)))
        return record

    def create(self) -> None:
        """Make the directory; with `overwrite`, delete the earlier run first.

        Raises:
            OutputError: the place is not writable.
        """
        with output_errors(self.directory):
            if self.overwrite and self.directory.exists():
                shutil.rmtree(self.directory)
            (self.directory / CHECKPOINTS).mkdir(parents=True, exist_ok=True)

    def describe(self, **content: Any) -> None:
        """Set entries of run.json, which is replaced as a whole."""
        self._content |= content
        write_text(self.directory / RUN, json.dumps(self._content, indent=1) + "\n")

    def forget_after(self, step: int) -> None:
        """Drop rows of later steps than the checkpoint's, and a row that was cut off: they will come again."""
        path = self.directory / METRICS
        if not path.exists():
            return
        kept = [line.decode() for line in path.read_bytes().splitlines() if _step(line) <= step]
        write_text(path, "".join(f"{line}\n" for line in kept))
        self.last = {}
        for line in kept:
            self.last |= {name: value for name, value in parse_json(line).items() if name not in ("step", "time")}

    def log(self, row: Mapping[str, Any], *, step: int) -> None:
        """Append a row, and hand it to the operating system: a killed process keeps it."""
        self.last |= row
        path = self.directory / METRICS
        line = json.dumps({"step": step, "time": datetime.now(UTC).isoformat(), **row})
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            write_all(descriptor, f"{line}\n".encode(), path)
        finally:
            os.close(descriptor)


class Spectator(Record):
    """The record as the ranks have it that do not write it."""

    def create(self) -> None:
        """The main rank does."""

    def describe(self, **content: Any) -> None:
        """The main rank does."""

    def forget_after(self, step: int) -> None:
        """The main rank does."""

    def log(self, row: Mapping[str, Any], *, step: int) -> None:
        """The main rank does."""


def read_run(directory: Path) -> dict[str, Any]:
    """The content of run.json.

    Raises:
        SourceError: it is missing or damaged.
    """
    content = look_for_run(directory)
    if content is None:
        raise SourceError("there is no run", found=directory, expected="a directory that upcycle train wrote")
    return content


def look_for_run(directory: Path) -> dict[str, Any] | None:
    """The content of run.json; None where there is none.

    Raises:
        SourceError: it is damaged.
    """
    try:
        content = read_object(directory / RUN, remedy="delete the run's directory, and train it again")
    except (FileNotFoundError, NotADirectoryError):
        return None
    return dict(in_todays_words(content))


def in_todays_words(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a run.json says, with today's names of options; another project's stays as it is."""
    if content.get("schema") != SCHEMA_VERSION or any(each not in content for each in KNOWN_BY):
        return content
    return {**content, "config": upgraded(content["config"])}


def read_own_run(directory: Path) -> dict[str, Any]:
    """The content of run.json of a training run of this project, in this version of the schema.

    Raises:
        SourceError: it is missing or damaged.
        RecordError: it is another project's, or of another version of the schema.
    """
    content = read_run(directory)
    check_training_run(content, directory)
    check_schema(content, directory)
    return content


def check_training_run(content: Mapping[str, Any], place: object) -> None:
    """Raise RecordError if a run.json, whatever its schema's version, is another project's."""
    missing = [each for each in KNOWN_BY if each not in content]
    if missing:
        raise RecordError(
            "this is not a training run of upcycle",
            found=f"{place}, without {', '.join(missing)}",
            expected="directories of this project's runs alone",
            remedy="leave it out, or choose another directory",
        )


def check_schema(content: Mapping[str, Any], place: object) -> None:
    """Raise RecordError if a training run was recorded in another version of the schema."""
    if content.get("schema") != SCHEMA_VERSION:
        raise RecordError(
            "a run was recorded in another version of the schema",
            found=f"{place}: schema {content.get('schema', 'without a number')}",
            expected=f"schema {SCHEMA_VERSION}",
            remedy="leave it out, or use the version of upcycle that wrote it",
        )


def _step(line: bytes) -> float:
    try:
        return int(parse_json(line)["step"])
    except (ValueError, LookupError, TypeError):
        return float("inf")


def _check_same(before: dict[str, Any], now: dict[str, Any]) -> None:
    one, other = flat(before), flat(now)
    differing = sorted(
        key
        for key in one.keys() | other.keys()
        if one.get(key) != other.get(key) and key.partition(".")[0] not in NOT_COMPARED
    )
    if differing:
        raise ConfigError(
            "the run at output was started with other options",
            found=", ".join(f"{key}={other.get(key)} (was {one.get(key)})" for key in differing),
            expected="the same options",
            remedy="give the same ones, or another output",
        )


def flat(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Options by dotted path."""
    paths: dict[str, Any] = {}
    for name, value in options.items():
        if isinstance(value, dict) and value:
            paths |= flat(value, f"{prefix}{name}.")
        else:
            paths[prefix + name] = value
    return paths
