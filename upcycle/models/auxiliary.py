"""Which files beside config and weights go with a model: tokenizer, generation config, licences. Knows names only."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any, Final

from upcycle.files.json import object_or_empty
from upcycle.models.adapter import ADAPTER

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

TOKENIZER_CONFIG: Final = "tokenizer_config.json"
GENERATION_CONFIG: Final = "generation_config.json"
TOKENIZER: Final = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/*",
    "*.model",
    "*.tiktoken",
    "tekken.json",
)
_LEGAL: Final = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "*USE_POLICY*")
OTHER: Final = (GENERATION_CONFIG, *(form for name in _LEGAL for form in (name, name.lower(), name.capitalize())))
# Of a Hub model; which code a tokenizer has is known only once its config is here.
HUB: Final = (*TOKENIZER, *OTHER, "*.py", ADAPTER)
# What an output makes anew, weights in any format, and what is nobody's to miss.
_NOT_MISSED: Final = (
    *("config.json", "README*", ".*", "__pycache__", "*.index.json"),
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx"),
)


def tokenizer_files(directory: Path) -> list[Path]:
    """Vocabulary, templates and settings of a directory's tokenizer, and its Python code; sorted."""
    return sorted({*_matching(directory, TOKENIZER), *_code(directory)})


def other_files(directory: Path) -> list[Path]:
    """Generation config, licences and notices of a directory; sorted."""
    return sorted(_matching(directory, OTHER))


def auxiliary_files(directory: Path) -> list[Path]:
    """Every file of a directory that goes with the model to where its weights go; sorted."""
    return sorted({*tokenizer_files(directory), *other_files(directory)})


def left_behind(directory: Path) -> list[str]:
    """Names in a directory that are neither weights nor taken along nor made anew; sorted, directories with a slash."""
    taken = {file.relative_to(directory).parts[0] for file in auxiliary_files(directory)}
    return sorted(
        f"{entry.name}/" if entry.is_dir() else entry.name
        for entry in directory.iterdir()
        if entry.name not in taken and not any(fnmatch(entry.name, pattern) for pattern in _NOT_MISSED)
    )


def code_references(directory: Path) -> list[str]:
    """What tokenizer_config.json's auto_map names, `file.Class` or `repository--file.Class`; sorted."""
    return sorted(set(_strings(read_tokenizer_config(directory).get("auto_map"))))


def read_tokenizer_config(directory: Path) -> dict[str, Any]:
    """The content of tokenizer_config.json; empty where there is none that can be read."""
    return object_or_empty(directory / TOKENIZER_CONFIG)


def _matching(directory: Path, patterns: Iterable[str]) -> set[Path]:
    return {file for pattern in patterns for file in directory.glob(pattern) if file.is_file()}


def _code(directory: Path) -> set[Path]:
    """The files that the auto_map names, and those that they import with a dot, as transformers follows them."""
    own = (reference.partition(".")[0] for reference in code_references(directory) if "--" not in reference)
    found: set[Path] = set()
    waiting = [directory / f"{module}.py" for module in own if re.fullmatch(r"\w+", module)]
    while waiting:
        file = waiting.pop()
        if file in found or not file.is_file():
            continue
        found.add(file)
        text = file.read_text(encoding="utf-8", errors="replace")
        imported = re.findall(r"^\s*(?:import\s+\.(\w+)\s*$|from\s+\.(\w+)\s+import)", text, flags=re.MULTILINE)
        waiting += [directory / f"{one or other}.py" for one, other in imported]
    return found


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _strings(each)
