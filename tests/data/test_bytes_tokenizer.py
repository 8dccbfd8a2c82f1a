"""The byte tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st
from texts import EOS, tokenizer
from transformers import AutoTokenizer

if TYPE_CHECKING:
    from pathlib import Path


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_ids_are_bytes_and_any_text_comes_back(text: str) -> None:
    ids = tokenizer()(text, add_special_tokens=False)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer().decode(ids) == text


def test_the_name_of_a_special_token_is_text() -> None:
    text = "a <|endoftext|> in a text"
    assert tokenizer()(text)["input_ids"] == list(text.encode())


def test_the_end_of_text() -> None:
    assert len(tokenizer()) == 257
    assert tokenizer().eos_token_id == tokenizer().pad_token_id == EOS
    assert tokenizer().decode([97, EOS], skip_special_tokens=True) == "a"


def test_it_is_saved(tmp_path: Path) -> None:
    tokenizer().save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "  héllo <|endoftext|> , world .\r\n\x00😀"
    assert loaded(text)["input_ids"] == list(text.encode())
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert (loaded.eos_token_id, loaded.pad_token_id, len(loaded)) == (EOS, EOS, 257)
