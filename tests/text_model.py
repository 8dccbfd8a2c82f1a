"""Plugin for tests that need text: some of it, a tiny Llama with a real byte-level tokenizer, and its conversion."""

from __future__ import annotations

import json
from pathlib import Path

import conversions
import models
import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from upcycle.models.text import DEFAULT_TEXT

VOCAB = 300
MODULES = ("abc", "bisect", "calendar", "cmd", "code", "copy", "csv", "glob", "heapq", "shlex", "stat", "types")


@pytest.fixture(scope="session")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with 300 tokens and a byte-level BPE tokenizer trained on the standard library's argparse.py."""
    directory = tmp_path_factory.mktemp("text") / "llama"
    models.save(models.build("llama", vocab_size=VOCAB), directory)
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<pad>", "<s>", "</s>"]
    trainer = BpeTrainer(vocab_size=VOCAB, initial_alphabet=alphabet, special_tokens=specials, show_progress=False)
    tokenizer.train([str(DEFAULT_TEXT)], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def text_moe(text_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its conversion to E4G2T2 with qwen2_moe."""
    return conversions.run(conversions.options(text_model, tmp_path_factory.mktemp("moe") / "moe")).directory


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some modules of the standard library, as a directory of text."""
    directory = tmp_path_factory.mktemp("data") / "text"
    directory.mkdir()
    library = Path(json.__file__).parent.parent
    for name in MODULES:
        (directory / f"{name}.txt").write_text((library / f"{name}.py").read_text())
    return directory
