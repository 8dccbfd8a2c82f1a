"""Windows of the packed tokens, and that a model keeps documents apart by their positions."""

from __future__ import annotations

import models
import numpy as np
import pytest
import torch

from upcycle.data.windows import Windows

LENGTH = 8
# Documents of 5, 9, 1, 3 and 10 tokens: several in a window, one over two windows, and one of a single token.
SIZES = (5, 9, 1, 3, 10)
TOKENS = np.random.default_rng(0).integers(4, models.VOCAB, sum(SIZES)).astype(np.uint16)
STARTS = np.cumsum([0, *SIZES[:-1]])
# float32 logits of order 1; only the order of the sums differs (4e-7 measured), and a mixed-up document gives 0.1.
TOLERANCE = 1e-5


def windows(*, document_attention: bool) -> Windows:
    return Windows(TOKENS, STARTS, sequence_length=LENGTH, document_attention=document_attention)


def test_labels_are_the_next_tokens() -> None:
    made = windows(document_attention=False)
    assert len(made) == (len(TOKENS) - 1) // LENGTH == 3
    for index, item in enumerate(made):
        assert item.keys() == {"input_ids", "labels"}
        first = index * LENGTH
        assert item["input_ids"].tolist() == TOKENS[first : first + LENGTH].tolist()
        assert item["labels"].tolist() == TOKENS[first + 1 : first + LENGTH + 1].tolist()
        assert item["input_ids"].dtype == item["labels"].dtype == torch.int64


@pytest.mark.parametrize(("tokens", "expected"), [(0, 0), (1, 0), (8, 0), (9, 1), (16, 1), (17, 2)])
def test_how_many(tokens: int, expected: int) -> None:
    made = Windows(TOKENS[:tokens], STARTS[:1], sequence_length=LENGTH, document_attention=False)
    assert len(made) == expected
    with pytest.raises(IndexError):
        made[expected]


def test_positions_begin_with_the_window_and_with_every_document() -> None:
    positions = [item["position_ids"].tolist() for item in windows(document_attention=True)]
    assert positions == [[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 3, 4, 5, 0, 0], [0, 1, 0, 1, 2, 3, 4, 5]]


def apart(model: torch.nn.Module, item: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of each document of a window run alone, [L, V]."""
    begins = [*(item["position_ids"] == 0).nonzero().flatten().tolist(), LENGTH]
    parts = [item["input_ids"][begin:end] for begin, end in zip(begins, begins[1:], strict=False)]
    return torch.cat([model(input_ids=part[None], use_cache=False).logits[0] for part in parts])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gemma3"])
def test_documents_are_kept_apart(name: str, attention: str) -> None:
    model = models.build(name)
    model.set_attn_implementation(attention)
    items = list(windows(document_attention=True))
    batch = {key: torch.stack([item[key] for item in items]) for key in ("input_ids", "position_ids")}
    with torch.inference_mode():
        alone = torch.stack([apart(model, item) for item in items])
        packed = model(**batch, use_cache=False).logits
        assert float((packed - alone).abs().max()) <= TOLERANCE
        # Mutants: no positions, positions of the window, and the cache that transformers makes unless told not to.
        mutants = [
            model(input_ids=batch["input_ids"], use_cache=False).logits,
            model(batch["input_ids"], position_ids=torch.arange(LENGTH)[None].expand(3, -1), use_cache=False).logits,
            model(**batch, use_cache=True).logits,
        ]
    assert all(float((mutant - alone).abs().max()) > 100 * TOLERANCE for mutant in mutants)
