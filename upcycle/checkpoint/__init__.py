"""Reads and writes checkpoints as bytes; knows no models, no other room, and transformers only for GGUF files."""

from upcycle.checkpoint.dtypes import TORCH_DTYPES, code_from_name, dtype_bytes, dtype_code, dtype_name, torch_dtype
from upcycle.checkpoint.gguf import gguf_config, write_gguf_tokenizer
from upcycle.checkpoint.gguf_generation import gguf_generation, gguf_sampling
from upcycle.checkpoint.hashing import hash_files, sha256_file
from upcycle.checkpoint.pointer import is_pointer, not_downloaded
from upcycle.checkpoint.reader import TensorInfo, TensorReader, has_weights, open_reader, read_index_names
from upcycle.checkpoint.writer import (
    Shard,
    StagedFiles,
    Staging,
    TensorSpec,
    check_replaceable,
    index_json,
    layout_shards,
)

__all__ = [
    "TORCH_DTYPES",
    "Shard",
    "StagedFiles",
    "Staging",
    "TensorInfo",
    "TensorReader",
    "TensorSpec",
    "check_replaceable",
    "code_from_name",
    "dtype_bytes",
    "dtype_code",
    "dtype_name",
    "gguf_config",
    "gguf_generation",
    "gguf_sampling",
    "has_weights",
    "hash_files",
    "index_json",
    "is_pointer",
    "layout_shards",
    "not_downloaded",
    "open_reader",
    "read_index_names",
    "sha256_file",
    "torch_dtype",
    "write_gguf_tokenizer",
]
