"""What a GGUF file says of generation. Knows transformers' reader of its metadata."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from pathlib import Path

_ENDS: Final = tuple(f"tokenizer.ggml.{end}_token_id" for end in ("eos", "eot", "eom"))
_SAMPLING: Final = "general.sampling."


def gguf_generation(path: Path) -> dict[str, Any]:
    """What generation_config.json says for a GGUF file: every token that ends text, a turn or a message.

    Empty where config.json says it all, which knows the end of text alone.
    """
    metadata = _metadata(path)
    ends = [metadata[key] for key in _ENDS if metadata.get(key) is not None]
    beginning = metadata.get("tokenizer.ggml.bos_token_id")
    if len(set(ends)) < 2:
        return {}
    return {
        **({} if beginning is None else {"bos_token_id": int(beginning)}),
        "eos_token_id": [int(each) for each in dict.fromkeys(ends)],
    }


def gguf_sampling(path: Path) -> list[str]:
    """Advice on sampling in a GGUF file, `key=value`; whether to sample at all it does not say."""
    return [f"{key}={value}" for key, value in sorted(_metadata(path).items()) if key.startswith(_SAMPLING)]


def _metadata(path: Path) -> dict[str, Any]:
    from transformers.integrations.gguf.reader import read_gguf_metadata

    metadata: dict[str, Any] = read_gguf_metadata(str(path))[0]
    return metadata
