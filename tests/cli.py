"""What the tests of the command share: how it ended, how to start it as a process, and how to spoil a checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

INDEX = "model.safetensors.index.json"
SMALL = ("moe.expansion=2", "moe.granularity=2", "moe.top_k=2")  # E2G2T2: 4 experts
SHARD = "max_shard_size=2KB"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a command ended.

    Attributes:
        status: its exit status; minus the signal that killed it.
        out, err: what it printed.
    """

    status: int
    out: str
    err: str

    def refused(self, *fragments: str, found: str = "", remedy: str | None = None) -> None:
        """Assert that it ended with one message about a bad input, and what that says."""
        assert self.status == 1, self
        assert "Traceback" not in self.err
        message = self.err[self.err.rindex("upcycle: ") :]
        for fragment in fragments:
            assert fragment in message
        lines = {label: rest for label, _, rest in (line.strip().partition(":") for line in message.splitlines()[1:])}
        assert found in lines.get("found", ""), message
        assert remedy is None or remedy in lines["remedy"], message


def command(*arguments: object) -> list[str]:
    """Command line of `upcycle ARGUMENT …` with this interpreter."""
    return [sys.executable, "-c", "from upcycle.cli import main; main()", *map(str, arguments)]


def process(*arguments: object, cwd: Path, **environment: str) -> Outcome:
    """Run `upcycle ARGUMENT …` as a process to its end."""
    ended = subprocess.run(
        command(*arguments),
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return Outcome(status=ended.returncode, out=ended.stdout, err=ended.stderr)


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below a directory."""
    return {str(f.relative_to(directory)): f.read_bytes() for f in sorted(directory.rglob("*")) if f.is_file()}


def edit_json(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON object in place."""
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def edit_tensor(directory: Path, name: str, change: Callable[[Tensor], Tensor]) -> None:
    """Change one tensor of a sharded checkpoint."""
    file = directory / json.loads((directory / INDEX).read_text())["weight_map"][name]
    tensors = load_file(file)
    save_file({**tensors, name: change(tensors[name])}, file, metadata={"format": "pt"})


def add_tensor(directory: Path, name: str, tensor: Tensor) -> None:
    """Add a tensor to a sharded checkpoint, in a file of its own."""
    file = f"{name}.safetensors"
    save_file({name: tensor}, directory / file, metadata={"format": "pt"})
    edit_json(directory / INDEX, lambda index: index["weight_map"].update({name: file}))


def remove_tensor(directory: Path, name: str) -> None:
    """Remove a tensor from a sharded checkpoint."""
    file = directory / json.loads((directory / INDEX).read_text())["weight_map"][name]
    tensors = load_file(file)
    save_file({key: value for key, value in tensors.items() if key != name}, file, metadata={"format": "pt"})
    edit_json(directory / INDEX, lambda index: index["weight_map"].pop(name))
