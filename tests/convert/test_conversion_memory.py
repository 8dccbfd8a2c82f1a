"""Memory of whole conversions, of one process and of several, against what planning allows them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
import torch
from cli import SMALL, command
from ended import Ended
from safetensors.torch import save_file

if TYPE_CHECKING:
    from collections.abc import Iterator

pytest_plugins = ["tiny"]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]

BASE_BYTES = 300 * 10**6  # the interpreter with torch and transformers takes about 250 MB
TENSORS_AT_ONCE = 3
OPTIONS = [
    ("target=qwen2_moe",),
    ("target=upcycled_moe", "moe.shared_experts=2"),
    ("target=upcycled_moe", "moe.granularity=1", "dtype=float32"),
    ("init=noise", "moe.granularity=1"),
    ("init=drop", "moe.granularity=1"),
    ("init=random", "moe.granularity=1"),
]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A bfloat16 Llama of about 120 MB whose largest tensors are the FFN's matrices, 34 MB each."""
    directory = tmp_path_factory.mktemp("large") / "llama"
    directory.mkdir()
    hidden, width, vocab, layers = 1024, 16384, 4096, 1
    fields = {"vocab_size": vocab, "hidden_size": hidden, "intermediate_size": width, "num_hidden_layers": layers}
    fields |= {"num_attention_heads": 8, "num_key_value_heads": 8, "tie_word_embeddings": True, "dtype": "bfloat16"}
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", **fields}))
    start = "model.layers.0."
    shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    shapes |= {f"{start}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    shapes |= {f"{start}self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
    shapes |= {f"{start}mlp.{name}_proj.weight": (width, hidden) for name in ("gate", "up")}
    shapes |= {f"{start}mlp.down_proj.weight": (hidden, width)}
    tensors = {name: torch.full(shape, 0.5, dtype=torch.bfloat16) for name, shape in shapes.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    yield directory
    shutil.rmtree(directory)


def anonymous_bytes(process: psutil.Process) -> int:
    """RssAnon of a process; 0 if it has ended."""
    with suppress(FileNotFoundError, ProcessLookupError):
        fields = Path(f"/proc/{process.pid}/status").read_text()
        if "RssAnon:" in fields:
            return 1024 * int(fields.split("RssAnon:")[1].split()[0])
    return 0


def peak_anonymous_bytes(running: subprocess.Popen[bytes]) -> tuple[int, int]:
    """Of a process and those that it started, until its end: the largest sum, sampled, and how many they were."""
    peak, most, parent = 0, 0, psutil.Process(running.pid)
    while running.poll() is None:
        with suppress(psutil.NoSuchProcess):
            together = [anonymous_bytes(each) for each in (parent, *parent.children(recursive=True))]
            peak, most = max(peak, sum(together)), max(most, len(together))
        time.sleep(0.01)  # a tensor takes several times as long
    return peak, most


def peak_of(*arguments: str, output: Path) -> tuple[int, int]:
    line = command("convert", f"output={output}", *arguments)
    with Ended(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as running:
        found = peak_anonymous_bytes(running)
        assert running.wait() == 0
    shutil.rmtree(output)
    return found


@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
def test_one_process(large, tmp_path, options):
    largest = 16384 * 1024 * 2
    peak, processes = peak_of(f"source={large}", *SMALL, *options, output=tmp_path / "output")
    assert processes == 1
    assert peak <= TENSORS_AT_ONCE * largest + BASE_BYTES, f"{peak / 1e6:.0f} MB"


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[4]], ids=" ".join)
def test_two_workers(upcycle, large, tmp_path, options):
    """Both have to run at once, and the process that started them is counted too."""
    arguments = (f"source={large}", *SMALL, *options, "workers=2", "max_shard_size=60MB")
    effort = json.loads(upcycle("plan", *arguments, "format=json").out)["effort"]
    peak, processes = peak_of(*arguments, output=tmp_path / "output")
    assert effort["workers"] == 2
    assert processes > 2
    assert peak <= effort["peak_memory"], f"{peak / 1e6:.0f} MB"
