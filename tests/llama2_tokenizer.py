"""A tokenizer as Llama 2 has it: spaces become `▁`, unknown characters become bytes; and nothing says its class."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

if TYPE_CHECKING:
    from pathlib import Path

VOCAB = 320
TEXT = "The year 2023 was good,\n\n  and  日本 too 🙂"


def write_tokenizer(directory: Path) -> None:
    """Write tokenizer.json alone."""
    special = ["<unk>", "<s>", "</s>"]
    made = Tokenizer(BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    undone = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(undone)
    kept = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = BpeTrainer(vocab_size=VOCAB, special_tokens=kept, show_progress=False)
    made.train_from_iterator(["the year was good and the sun shone too"], trainer)
    made.save(str(directory / "tokenizer.json"))
