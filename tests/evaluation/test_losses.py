"""Losses on held-out text against a slow loop."""

from __future__ import annotations

import math

import models
import numpy as np
import pytest
import torch

from upcycle.data.windows import Windows
from upcycle.evaluation.losses import domain_losses

LENGTH = 8
TOKENS = np.random.default_rng(0).integers(0, models.VOCAB, 60).astype(np.uint16)
STARTS = np.array([0, 5, 21, 30, 44])
TOLERANCE = 1e-6  # relative; sums of 56 float32 losses in another order


def windows(*, document_attention: bool = False) -> Windows:
    return Windows(TOKENS, STARTS, sequence_length=LENGTH, document_attention=document_attention)


def by_hand(model: torch.nn.Module, count: int) -> float:
    """Mean loss of the first windows, token by token, each from what is before it in its window."""
    total = 0.0
    for first in range(0, count * LENGTH, LENGTH):
        for place in range(1, LENGTH + 1):
            before = torch.from_numpy(TOKENS[first : first + place].astype(np.int64))
            scores = model(before[None]).logits[0, -1].double()
            total -= float(scores.log_softmax(-1)[int(TOKENS[first + place])])
    return total / (count * LENGTH)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("count", [None, 2])
def test_the_loss_is_that_of_a_slow_loop(batch_size: int, count: int | None) -> None:
    model = models.build("llama")
    model.train()
    found = domain_losses(model, {"a": windows()}, batch_size=batch_size, windows=count)
    used = count or len(windows())
    with torch.no_grad():
        expected = by_hand(model.eval(), used)
    assert found["a"][1] == used * LENGTH
    assert math.isclose(found["a"][0], expected, rel_tol=TOLERANCE)
    assert not math.isclose(found["a"][0], by_hand_shifted(model, used), rel_tol=1e-3)


def by_hand_shifted(model: torch.nn.Module, count: int) -> float:
    """Mutant: every token is asked for itself."""
    with torch.no_grad():
        items = [windows()[index] for index in range(count)]
        logits = torch.cat([model(item["input_ids"][None]).logits[0] for item in items])
        return float(torch.nn.functional.cross_entropy(logits, torch.cat([item["input_ids"] for item in items])))


def test_documents_are_kept_apart_when_asked() -> None:
    model = models.build("llama")
    together, apart = (
        domain_losses(model, {"a": windows(document_attention=asked)}, batch_size=4, windows=None)["a"][0]
        for asked in (False, True)
    )
    assert abs(together - apart) > 1e-3


def test_the_model_stays_in_its_mode() -> None:
    model = models.build("llama")
    for training in (True, False):
        model.train(training)
        domain_losses(model, {"a": windows()}, batch_size=4, windows=1)
        assert model.training is training
