"""What a tokenizer does to text, and how an output's comes to do what the source's does.

AutoTokenizer chooses the class by model_type, unless `tokenizer_class` in tokenizer_config.json names one, and a class
may put its own pre-tokenizer, normaliser and decoder in the place of those in tokenizer.json.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any, Final

from upcycle.errors import SourceError
from upcycle.models.auxiliary import TOKENIZER_CONFIG, read_tokenizer_config
from upcycle.models.load import load_tokenizer_from

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

TEXTS: Final = (
    "The year 2023 was GOOD , iPhone and McDonald 's too .",
    "  two spaces,\ttab\n\n  new lines \r\nand an end ",
    "def f(x):\n    return x[0] ** 1234567 != -3.14  # ok",
    "naïve Café, e\u0301 and ﬁ; Привет; שלום",
    "日本語の文章です。中文句子，한국어 문장",
    "👩‍🚀🙂 …‽ \u00a0\u200b",
    "<s>[INST] a </s><|endoftext|> <unk><pad> b",
)
AS_IS: Final = "PreTrainedTokenizerFast"  # takes tokenizer.json as it is, by the name that transformers 4 knows too
_SAME_AS_IS: Final = "TokenizersBackend"


def backend_state(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The content of a fast tokenizer, without what its last call left behind."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    return {field: value for field, value in content.items() if field not in ("truncation", "padding")}


def behaviour(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What decides ids, decoded text, chat and batches, by name: equal for two tokenizers that do the same."""
    special = tokenizer.all_special_tokens
    texts = {text: _round_trip(tokenizer, text) for text in (*TEXTS, " and ".join(special))}
    state = json.dumps(backend_state(tokenizer), sort_keys=True) if tokenizer.is_fast else ""
    return {
        **texts,
        "special tokens": {name: tokenizer.convert_tokens_to_ids(str(each)) for name, each in _named(tokenizer)},
        "chat template": getattr(tokenizer, "chat_template", None),
        "padding side": tokenizer.padding_side,
        "model inputs": list(tokenizer.model_input_names),
        "tokens": len(tokenizer),
        "content": hashlib.sha256(state.encode()).hexdigest(),
    }


def settle_tokenizer(directory: Path, wanted: Mapping[str, Any], name: str) -> str | None:
    """Make AutoTokenizer open a directory's tokenizer so that it does what is wanted.

    Args:
        directory: with config.json and the tokenizer's files.
        wanted: `behaviour` of the tokenizer that it stands for.
        name: of that tokenizer's class.

    Returns:
        The class that tokenizer_config.json had to name; None where it opens right by itself.

    Raises:
        SourceError: with no class does it do what is wanted.
    """
    if _difference(directory, wanted) is None:
        return None
    for each in dict.fromkeys((AS_IS if name == _SAME_AS_IS else name, AS_IS)):
        content = {**read_tokenizer_config(directory), "tokenizer_class": each}
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (directory / TOKENIZER_CONFIG).write_text(text, encoding="utf-8")
        difference = _difference(directory, wanted)
        if difference is None:
            return each
    raise SourceError(
        "the output's tokenizer would not do what the source's does",
        found=difference,
        expected=f"what {name} does with the source's files",
        remedy="move the tokenizer's files out of the source, and give the output's own to train as tokenizer=DIR",
    )


def _round_trip(tokenizer: PreTrainedTokenizerBase, text: str) -> Any:
    """Ids with and without special tokens, and the texts that they decode to; or why there are none."""
    try:
        made = [tokenizer(text, add_special_tokens=add, verbose=False)["input_ids"] for add in (True, False)]
        texts = [tokenizer.decode(made[0], skip_special_tokens=skip) for skip in (False, True)]
    except Exception as error:  # tokenizers raises bare ones: where there is no unknown token, say
        return str(error)
    return made, texts


def _named(tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, Any]]:
    return [(name, each) for name, each in tokenizer.special_tokens_map.items() if isinstance(each, str)]


def _difference(directory: Path, wanted: Mapping[str, Any]) -> str | None:
    """The first thing that a directory's tokenizer does otherwise, in words."""
    try:
        tokenizer = load_tokenizer_from(directory)
    except SourceError as error:
        return " ".join(str(error).split())
    found = behaviour(tokenizer)
    differing = next((name for name in wanted if found.get(name) != wanted[name]), None)
    return differing and f"{type(tokenizer).__name__} differs in {differing!r}: {found.get(differing)!r:.120}"
