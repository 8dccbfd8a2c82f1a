"""The mirror of a record at W&B: every row once and in the record's order, whatever interrupts run or network.

Line i of metrics.jsonl is history step i of the W&B run. A resumed run repeats the rows that it lost, so those that
W&B holds already are not sent again. Metrics are drawn against the record's `step`, the optimizer step.
"""

from __future__ import annotations

import os
import secrets
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from upcycle.files.json import parse_json
from upcycle.models.manifest import REPORT
from upcycle.tracking.record import CHECKPOINTS, METRICS
from upcycle.tracking.schema import METRICS as SCHEMA
from upcycle.tracking.schema import metric
from upcycle.tracking.status import FINISHED
from upcycle.tracking.tags import arm_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from wandb import Run as WandbRun

START_SECONDS, FINISH_SECONDS = 30.0, 120.0  # that a server may take before it is given up
TAG_LENGTH = 64  # characters: the client refuses longer ones
CHANGING = ("status", "error", "summary", "wandb")  # entries of run.json that are not what was run
Identity = dict[str, Any]


def new_identity(project: str, entity: str | None) -> Identity:
    """What names a W&B run: the entry `wandb` of run.json, with `url` and `rows` once the server knows it.

    `rows` is how many the server is known to hold: `upcycle sync` asks.
    """
    return {"id": secrets.token_hex(4), "project": project, "entity": entity}


def agents_identity() -> Identity | None:
    """The W&B run that a sweep's agent has started this process for; its client takes no other name."""
    environment = os.environ
    if "WANDB_SWEEP_ID" not in environment:
        return None
    names = {"id": "WANDB_RUN_ID", "project": "WANDB_PROJECT", "entity": "WANDB_ENTITY"}
    return {key: environment.get(name) for key, name in names.items()}


class Mirror:
    """An open W&B run, and what of the record it holds.

    Args:
        run: the W&B run.
        directory: the record's.
        held: rows that W&B holds already.
        per_step: what an optimizer step adds to metrics that only grow. They stand in every row at W&B, which draws a
            metric against another only where both are in one row.
    """

    def __init__(self, run: WandbRun, directory: Path, *, held: int, per_step: Mapping[str, int]) -> None:
        self._run, self._path, self._held, self._per_step = run, directory / METRICS, held, per_step
        self._stream: BinaryIO | None = None
        self._line = 0
        self._defined: set[str] = set()

    @property
    def rows(self) -> int:
        """Rows that the W&B run holds."""
        return max(self._held, self._line)

    @property
    def url(self) -> str | None:
        return self._run.url

    def update(self) -> None:
        """Hand over the rows that were added to the record; one that was cut off is none."""
        if self._stream is None:
            if not self._path.exists():
                return
            self._stream = self._path.open("rb")
        while (line := self._stream.readline()).endswith(b"\n"):
            if self._line >= self._held:
                self._send(parse_json(line))
            self._line += 1
        self._stream.seek(-len(line), os.SEEK_CUR)

    def finish(self, status: str, artifacts: Mapping[str, list[Path]]) -> None:
        """Hand over the rest, and close the W&B run once the server has everything.

        Args:
            status: of the record.
            artifacts: files and directories by type.

        Raises:
            TimeoutError: the server did not take it in time.
        """
        try:
            self.update()
            for kind, files in artifacts.items():
                self._send_artifact(kind, files)
        finally:
            self.close(status)

    def close(self, status: str) -> None:
        """Close the W&B run with what it holds.

        Raises:
            TimeoutError: as for `finish`.
        """
        if self._stream:
            self._stream.close()
        try:
            self._run.summary["status"] = status
        finally:
            self._run.finish(exit_code=0 if status == FINISHED else 1)

    def _send(self, row: dict[str, Any]) -> None:
        time = datetime.fromisoformat(row.pop("time")).timestamp()
        row |= {name: each * row["step"] for name, each in self._per_step.items()}
        for name in row.keys() - self._defined:
            known = metric(name)
            self._run.define_metric(
                name,
                step_metric=None if name == "step" else "step",
                summary=known.reduction if known and known.reduction != "last" else None,  # last is W&B's own
            )
        self._defined |= row.keys()
        values = {name: _histogram(value) if isinstance(value, list) else value for name, value in row.items()}
        self._run.log({**values, "_timestamp": time}, step=self._line, commit=True)

    def _send_artifact(self, kind: str, paths: list[Path]) -> None:
        import wandb

        artifact = wandb.Artifact(f"{kind}-{self._run.id}", type=kind)
        for path in paths:
            add = artifact.add_dir if path.is_dir() else artifact.add_file
            add(str(path), name=path.name, policy="immutable")  # others are copied to the home directory first
        self._run.log_artifact(artifact)


def open_mirror(directory: Path, content: Mapping[str, Any], *, online: bool, held: int = 0) -> Mirror:
    """Start the W&B run that belongs to a record, or go on with it.

    Args:
        directory: the record's.
        content: of its run.json, with the entry `wandb`.
        online: whether to ask the server, which says how many rows it holds.
        held: offline: rows that earlier offline runs hold.

    Raises:
        Exception: whatever the client of W&B raises where there is no server, or no account there.
    """
    import wandb

    options, identity = content["config"].get("wandb") or {}, content["wandb"]
    run = wandb.init(
        mode="online" if online else "offline",
        id=identity["id"],
        resume="allow" if online else None,
        project=identity["project"],
        entity=identity["entity"],
        name=_name(directory, content),
        group=options.get("group"),
        tags=[tag[:TAG_LENGTH] for tag in options.get("tags") or ()],
        config=wandb_config(content),
        dir=str(directory),
        settings=wandb.Settings(
            silent=True,
            console="off",  # the progress bar is not worth keeping
            reinit="create_new",  # a run that the caller has open is not ours
            init_timeout=START_SECONDS,
            finish_timeout=FINISH_SECONDS,
            finish_timeout_raises=True,
        ),
    )
    return Mirror(run, directory, held=run.starting_step if online else held, per_step=_per_step(content))


def _per_step(content: Mapping[str, Any]) -> dict[str, int]:
    options = content["config"]
    tokens = options["batch"]["sequences"] * options["sequence_length"]
    return {"train/tokens": tokens, "train/flops": content["flops_per_step"]}


def wandb_config(content: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a W&B run: what run.json holds, and the unit of every metric.

    Of the manifest without the entry for every tensor: a large model has more of them than W&B shows.
    """
    fixed = {name: value for name, value in content.items() if name not in CHANGING}
    if "manifest" in fixed:
        fixed["manifest"] = {name: value for name, value in fixed["manifest"].items() if name != "tensors"}
    return {**fixed, "units": {each.name: each.unit for each in SCHEMA}}


def _name(directory: Path, content: Mapping[str, Any]) -> str:
    """What people see: of a sweep's run its arm and seed, of another its directory."""
    arm = arm_of((content["config"].get("wandb") or {}).get("tags") or ())
    return f"{arm}, seed {content['config']['seed']}" if arm else directory.resolve().name


def artifacts(directory: Path, content: Mapping[str, Any]) -> dict[str, list[Path]]:
    """Files, and directories of shards, that go with a record, by type, if its options ask for them."""
    options = content["config"]
    if not (options.get("wandb") or {}).get("artifacts"):
        return {}
    report = [Path(options["source"]).expanduser() / REPORT] if options["source"] else []
    found = {"checkpoint": sorted((directory / CHECKPOINTS).glob("*.ckpt")), "equivalence": report}
    return {kind: existing for kind, paths in found.items() if (existing := [path for path in paths if path.exists()])}


def _histogram(values: list[float]) -> Any:
    """A bin for each expert: W&B draws it over the steps as a heat map, and the list can be read back."""
    import wandb

    if len(values) > wandb.Histogram.MAX_LENGTH:
        return values
    return wandb.Histogram(np_histogram=(np.array(values), np.arange(len(values) + 1)))
