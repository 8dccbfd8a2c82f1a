"""Executes a plan: reader -> init -> writer, then the files beside the weights."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from upcycle.arch.targets import TARGETS
from upcycle.card import model_card
from upcycle.checkpoint import Staging, TensorSpec, hash_files, index_json, torch_dtype, write_gguf_tokenizer
from upcycle.config import ConvertConfig
from upcycle.errors import OutputError
from upcycle.manifest import MANIFEST, manifest_json
from upcycle.materialise import Materialiser
from upcycle.modeling import REMOTE_CODE_FILES
from upcycle.prepare import Conversion, prepare

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
    conversion = prepare(config, execute=True)
    output = Path(config.output).expanduser()
    staging = Staging.open(
        output, fingerprint=_fingerprint(conversion, config), overwrite=config.overwrite, resume=config.resume
    )
    with staging:
        missing = [shard for shard in conversion.shards if not staging.has(shard)]
        _check_disk(sum(shard.nbytes for shard in missing), conversion.free, output)
        source, tensors = conversion.source, conversion.target_tensors()
        materialiser = Materialiser(source.read, config.seed)

        def chunks(spec: TensorSpec) -> Iterator[torch.Tensor]:
            return materialiser.parts(tensors[spec.name], torch_dtype(spec.dtype))

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


def output_config(conversion: Conversion) -> dict[str, Any]:
    """config.json of the output, with defaults filled in and checked by transformers."""
    from transformers import AutoConfig

    fields = dict(conversion.plan.config)
    auto_map = fields.pop("auto_map", None)
    written = AutoConfig.for_model(**fields).to_diff_dict()
    codes = {tensor.dtype for tensor in conversion.plan.tensors if tensor.kind in ("expert", "backbone")}
    widest = torch_dtype(max(codes, key=lambda code: torch_dtype(code).itemsize))
    return {
        **written,
        "architectures": [TARGETS[conversion.plan.target].architecture],
        "dtype": str(widest).removeprefix("torch."),
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
