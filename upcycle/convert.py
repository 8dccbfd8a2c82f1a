"""Executes a plan: reader -> init -> writer, then the files beside the weights."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from upcycle.arch.targets import TARGETS
from upcycle.card import model_card
from upcycle.checkpoint import (
    Staging,
    TensorSpec,
    check_replaceable,
    dtype_bytes,
    dtype_name,
    hash_files,
    index_json,
    torch_dtype,
    write_gguf_tokenizer,
)
from upcycle.errors import OutputError, SourceError
from upcycle.manifest import MANIFEST, manifest_json
from upcycle.materialise import Materialiser
from upcycle.modeling import REMOTE_CODE_FILES
from upcycle.prepare import Conversion, prepare
from upcycle.source import expanded

if TYPE_CHECKING:
    from upcycle.config import ConvertConfig

logger = logging.getLogger("upcycle")

OnBytes = Callable[[int], None]


def convert(config: ConvertConfig, *, on_plan: Callable[[Conversion], OnBytes]) -> Path:
    """Convert a dense checkpoint into a MoE checkpoint.

    The same source, config and seed give the same bytes, whatever the shard size. Whenever it is interrupted, the
    output's name holds either nothing (or what was there before) or the complete checkpoint.

    Args:
        config: the options.
        on_plan: called once with the checked plan; what it returns is called with the number of bytes written.

    Returns:
        The output directory.

    Raises:
        UpcycleError: a bad request, source or output; nothing is left under the output's name.
    """
    output = expanded(config.output)
    check_replaceable(output.resolve(), overwrite=config.overwrite)  # before a download, and before calibration
    conversion = prepare(config, execute=True)
    staging = Staging.open(
        output, fingerprint=_fingerprint(conversion, config), overwrite=config.overwrite, resume=config.resume
    )
    with staging, _keeping_what_can_be_resumed(staging, conversion), _one_thread():
        missing = [shard for shard in conversion.shards if not staging.has(shard)]
        _check_disk(sum(shard.nbytes for shard in missing), conversion.free, output)
        source, tensors = conversion.source, conversion.target_tensors()
        materialiser = Materialiser(source.read, config.seed)

        def chunks(spec: TensorSpec) -> Iterator[torch.Tensor]:
            return materialiser.blocks(tensors[spec.name], torch_dtype(spec.dtype))

        on_bytes = on_plan(conversion)
        hashes = hash_files(source.files)
        for shard in conversion.shards:
            if shard in missing:
                staging.write_shard(shard, chunks, on_bytes)
            else:
                on_bytes(shard.nbytes)
        if len(conversion.shards) > 1:
            staging.write_text("model.safetensors.index.json", index_json(conversion.shards))
        manifest = manifest_json(conversion, config, hashes.result())
        staging.write_text(MANIFEST, manifest)
        staging.write_text("config.json", json.dumps(output_config(conversion), indent=2, sort_keys=True) + "\n")
        staging.write_text("README.md", model_card(json.loads(manifest), conversion.plan))
        _auxiliary(conversion, staging)
        staging.commit()
    return output


@contextmanager
def _one_thread() -> Iterator[None]:
    """Scaling keeps up with the disk on one thread; more of them spin, and take the core that its writes need."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _keeping_what_can_be_resumed(staging: Staging, conversion: Conversion) -> Iterator[None]:
    """After an error, delete the staging directory unless a file in it is complete and may serve a second run.

    An error in the source leaves nothing that may: the mended source is another one.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, SourceError) or not any(map(staging.has, conversion.shards)):
            shutil.rmtree(staging.directory, ignore_errors=True)
        elif staging.directory.exists():
            logger.warning("%s keeps what is complete: continue with resume=true", staging.directory)
        raise


def output_config(conversion: Conversion) -> dict[str, Any]:
    """config.json of the output, with defaults filled in and checked by transformers."""
    from transformers import AutoConfig

    fields = dict(conversion.plan.config)
    auto_map = fields.pop("auto_map", None)
    written = AutoConfig.for_model(**fields).to_diff_dict()
    codes = {tensor.dtype for tensor in conversion.plan.tensors if tensor.kind in ("expert", "backbone")}
    widest = max(codes, key=dtype_bytes)
    return {
        **written,
        "architectures": [TARGETS[conversion.plan.target].architecture],
        "dtype": dtype_name(widest),
        **({"auto_map": auto_map} if auto_map else {}),
    }


def _fingerprint(conversion: Conversion, config: ConvertConfig) -> str:
    source = conversion.source
    identity = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in source.files]
    shards = [(shard.file, shard.nbytes) for shard in conversion.shards]
    text = json.dumps([conversion.plan.fingerprint(), config.seed, identity, shards])
    return hashlib.sha256(text.encode()).hexdigest()


def _check_disk(needed: int, free: int, output: Path) -> None:
    if needed > free:
        raise OutputError(
            "the disk is too small for the output",
            found=f"{free / 1e9:.2f} GB free at {output.absolute().parent}",
            expected=f"{needed / 1e9:.2f} GB",
            remedy="free space, write elsewhere, or set dtype=bfloat16 or a smaller moe.expansion",
        )


def _auxiliary(conversion: Conversion, staging: Staging) -> None:
    source = conversion.source
    for file in source.auxiliary_files():
        staging.copy_file(file, str(file.relative_to(source.path)))
    if source.is_gguf:
        with tempfile.TemporaryDirectory() as directory:
            write_gguf_tokenizer(source.path, Path(directory))
            for file in sorted(Path(directory).iterdir()):
                staging.copy_file(file, file.name)
    if conversion.plan.target == "upcycled_moe":
        for file in REMOTE_CODE_FILES:
            staging.copy_file(file, file.name)
