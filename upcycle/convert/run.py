"""Executes a plan: reader -> init -> writer, then the files beside the weights."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from upcycle.arch.targets import TARGETS
from upcycle.checkpoint import (
    StagedFiles,
    Staging,
    check_replaceable,
    dtype_bytes,
    dtype_name,
    hash_files,
    index_json,
)
from upcycle.convert.beside import gathered, left_out
from upcycle.convert.card import model_card
from upcycle.convert.manifest import manifest_json, versions
from upcycle.convert.part import Part, parse_part
from upcycle.convert.prepare import Conversion, prepare
from upcycle.convert.workers import OnBytes, ShardWork, write_in_processes
from upcycle.errors import ConfigError, OutputError, SourceError
from upcycle.files.json import tagged
from upcycle.models.manifest import MANIFEST
from upcycle.models.source import expanded
from upcycle.models.spelling import with_old_words

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from upcycle.checkpoint import Shard
    from upcycle.convert.beside import Beside
    from upcycle.options.config import ConvertConfig

logger = logging.getLogger("upcycle")
DIGITS = 16  # of a hash that a person compares


def convert(config: ConvertConfig, *, on_plan: Callable[[Conversion, int], OnBytes]) -> Path | None:
    """Convert a dense checkpoint into a MoE checkpoint, or write one part of it.

    The same source, config and seed give the same bytes, whatever the shard size, workers and parts. Whenever it is
    interrupted, the output's name holds either nothing (or what was there before) or the complete checkpoint.

    Args:
        config: the options.
        on_plan: called once with the checked plan and the number of bytes that will be written here; what it returns
            is called with the number of bytes written.

    Returns:
        The output directory; None while other parts are missing.

    Raises:
        UpcycleError: a bad request, source or output; nothing is left under the output's name.
    """
    output = expanded(config.output)
    part = _part(config)
    check_replaceable(output.resolve(), overwrite=config.overwrite)  # before a download, and before calibration
    conversion = prepare(config, execute=True)
    mine = part.of(conversion.shards) if part else conversion.shards
    config_json = json.dumps(tagged(output_config(conversion)), indent=2, sort_keys=True, allow_nan=False) + "\n"
    with (
        gathered(conversion.source.path, config_json) as beside,
        _staging(conversion, config, part) as staging,
        _keeping_what_can_be_resumed(staging, conversion, part),
    ):
        _check_disk(staging, conversion.shards, conversion.free)
        on_bytes = on_plan(conversion, sum(shard.nbytes for shard in mine))
        hashes = None if part else hash_files(conversion.source.files)
        _write(mine, conversion, config, staging, on_bytes)
        if part and (missing := _incomplete(part, conversion, staging)):
            others = ", ".join(f"part={each}" for each in missing)
            logger.info("part=%s is complete, and these are not: %s; the last one makes %s", part, others, output)
            return None
        sha256 = (hashes or hash_files(conversion.source.files)).result()
        _write_beside(conversion, manifest_json(conversion, config, sha256), config_json, beside, staging)
        staging.commit()
        if left := left_out(conversion.source.path):
            logger.info("left behind in %s: %s", conversion.source.path, ", ".join(left))
    return output


def output_config(conversion: Conversion) -> dict[str, Any]:
    """config.json of the output, with defaults filled in and checked by transformers."""
    from transformers import AutoConfig

    fields, target = dict(conversion.plan.config), TARGETS[conversion.plan.target]
    auto_map = fields.pop("auto_map", None)
    written = AutoConfig.for_model(**fields).to_diff_dict()
    codes = {tensor.dtype for tensor in conversion.plan.tensors if tensor.kind in ("expert", "backbone")}
    widest = max(codes, key=dtype_bytes)
    return {
        **with_old_words(written, target),
        "architectures": [conversion.source.model.head.architecture(target.architecture)],
        "dtype": dtype_name(widest),
        **({"auto_map": auto_map} if auto_map else {}),
    }


def _part(config: ConvertConfig) -> Part | None:
    if config.part is None:
        return None
    if config.overwrite:
        raise ConfigError(
            "overwrite=true is for a conversion that one command makes",
            found=f"part={config.part}",
            expected="one of the two",
            remedy="move the old output away, or choose another one",
        )
    return parse_part(config.part)


def _staging(conversion: Conversion, config: ConvertConfig, part: Part | None) -> Staging:
    output, fingerprint = expanded(config.output), _fingerprint(conversion, config)
    if part:
        return Staging.join(output, fingerprint=fingerprint, part=str(part))
    return Staging.open(output, fingerprint=fingerprint, overwrite=config.overwrite, resume=config.resume)


@contextmanager
def _keeping_what_can_be_resumed(staging: Staging, conversion: Conversion, part: Part | None) -> Iterator[None]:
    """After an error, delete the staging directory unless a file in it is complete and may serve a second run.

    An error in the source leaves nothing that may: the mended source is another one. What other parts write too is
    never deleted; and it is no error if they have made the output meanwhile.
    """
    try:
        yield
    except BaseException as error:
        if part and isinstance(error, OutputError) and staging.committed():
            logger.info("another process completed %s first", staging.output)
            return
        if not part and (isinstance(error, SourceError) or not any(map(staging.has, conversion.shards))):
            shutil.rmtree(staging.directory, ignore_errors=True)
        elif staging.directory.exists():
            again = f"start part={part} again" if part else "continue with resume=true"
            logger.warning("%s keeps what is complete: %s", staging.directory, again)
        raise


def _write(
    shards: Sequence[Shard], conversion: Conversion, config: ConvertConfig, staging: Staging, on_bytes: OnBytes
) -> None:
    source = conversion.source
    missing = [shard for shard in shards if not staging.has(shard)]
    on_bytes(sum(shard.nbytes for shard in shards) - sum(shard.nbytes for shard in missing))
    work = ShardWork(
        source=source.path.absolute(),
        stored=source.stored,
        tensors=conversion.target_tensors(),
        seed=config.seed,
        bases=conversion.bases,
        staged=StagedFiles(directory=staging.directory, fingerprint=staging.fingerprint),
    )
    processes = min(config.workers, len(missing))
    if processes > 1:
        write_in_processes(work, missing, processes, on_bytes)
    else:
        work.write(missing, source.read, on_bytes)


def _incomplete(part: Part, conversion: Conversion, staging: Staging) -> list[Part]:
    return [each for each in part.all() if not all(map(staging.has, each.of(conversion.shards)))]


def _write_beside(conversion: Conversion, manifest: str, config_json: str, beside: Beside, staging: Staging) -> None:
    """Write everything that is not weights."""
    if len(conversion.shards) > 1:
        staging.write_text("model.safetensors.index.json", index_json(conversion.shards))
    staging.write_text(MANIFEST, manifest)
    staging.write_text("config.json", config_json)
    staging.write_text("README.md", model_card(json.loads(manifest), conversion, beside.remarks))
    beside.stage(staging, conversion.plan.target)


def _fingerprint(conversion: Conversion, config: ConvertConfig) -> str:
    """What every process that writes some of the output must share, in words that show which of it differs."""
    source = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in conversion.source.files]
    shards = [(shard.file, shard.nbytes) for shard in conversion.shards]
    shared = {
        "plan": conversion.plan.fingerprint()[:DIGITS],
        "seed": config.seed,
        "source": _digest(source),
        "files": _digest(shards),
        **versions(),
        "machine": platform.machine(),
    }
    return ", ".join(f"{name} {value}" for name, value in shared.items())


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:DIGITS]


def _check_disk(staging: Staging, shards: Sequence[Shard], free: int) -> None:
    needed = sum(shard.nbytes for shard in shards if not staging.has(shard))
    if needed > free:
        raise OutputError(
            "the disk is too small for the output",
            found=f"{free / 1e9:.2f} GB free at {staging.output.parent}",
            expected=f"{needed / 1e9:.2f} GB",
            remedy="free space, write elsewhere, or set dtype=bfloat16 or a smaller moe.expansion",
        )
