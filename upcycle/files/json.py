"""The door for JSON: a user's file that cannot be read is a typed error that names it; what is written is strict."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from upcycle.errors import SourceError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

# Levels that the reader of tokenizer.json takes (serde_json's recursion limit); no file of a model comes near it, and
# what copies or writes such values later recurses as well.
MAX_DEPTH: Final = 127


class NotJsonError(ValueError):
    """Text that is no JSON; the message says why in a line."""


def parse_json(text: str | bytes) -> Any:
    """What JSON in UTF-8 says.

    Raises:
        NotJsonError: it is not UTF-8, not JSON, or nested more than `MAX_DEPTH` deep.
    """
    try:
        content = json.loads(text.decode() if isinstance(text, bytes) else text)
    except UnicodeDecodeError as error:
        raise NotJsonError(f"not UTF-8: {error}") from error
    except ValueError as error:
        raise NotJsonError(error) from error
    except RecursionError:
        raise _too_deep() from None
    if _deeper(content, MAX_DEPTH):
        raise _too_deep()
    return content


def read_object(file: Path, *, remedy: str) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        file: the file.
        remedy: what to do about one that holds none.

    Raises:
        FileNotFoundError, NotADirectoryError: it is not there; the caller knows what that means.
        SourceError: it cannot be read, or is no JSON object.
    """
    try:
        content = parse_json(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise SourceError(f"cannot read {file}", found=error.strerror) from error
    except NotJsonError as error:
        raise SourceError(f"{file.name} is not JSON", found=f"{file}: {error}", remedy=remedy) from error
    if not isinstance(content, dict):
        raise SourceError(f"{file.name} is not a JSON object", found=f"{file}: {content!r:.40}", remedy=remedy)
    return content


def object_or_empty(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is none that can be read, which is for others to report."""
    try:
        content = parse_json(file.read_bytes())
    except (OSError, NotJsonError):
        return {}
    return content if isinstance(content, dict) else {}


def check_objects(directory: Path, names: Iterable[str]) -> None:
    """Check files that another library is about to read, as far as they are there.

    Raises:
        SourceError: one cannot be read, or is no JSON object.
    """
    for name in names:
        with suppress(FileNotFoundError, NotADirectoryError):
            read_object(directory / name, remedy="download it again")


def json_text(content: Any, *, indent: int) -> str:
    """Content as strict JSON, which has no word for NaN and infinities: null stands for them."""
    return json.dumps(_strict(content), indent=indent, allow_nan=False)


def tagged(content: Any) -> Any:
    """Content with infinities and NaN as transformers writes them in config.json, and reads them again."""
    if isinstance(content, dict):
        return {name: tagged(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [tagged(value) for value in content]
    if not isinstance(content, float) or math.isfinite(content):
        return content
    return {"__float__": "NaN" if math.isnan(content) else "Infinity" if content > 0 else "-Infinity"}


def _strict(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: _strict(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_strict(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _deeper(content: Any, levels: int) -> bool:
    """Whether objects and arrays are nested in more levels."""
    level = [content] if isinstance(content, dict | list) else []
    for _ in range(levels):
        inside = (each.values() if isinstance(each, dict) else each for each in level)
        level = [value for values in inside for value in values if isinstance(value, dict | list)]
        if not level:
            return False
    return bool(level)


def _too_deep() -> NotJsonError:
    return NotJsonError(f"nested more than {MAX_DEPTH} deep")
