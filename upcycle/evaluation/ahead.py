"""How well a block for multi-token prediction predicts, and how often the model would accept its guesses.

Shapes: B windows, L tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F

from upcycle.models.ahead import ahead_block, ahead_logits

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from upcycle.models.ahead import AheadBlock


class Ahead(NamedTuple):
    """One depth on held-out text.

    Attributes:
        loss: cross entropy in nats per token.
        accepted: share of positions at which the block's best guess, and its guesses for the tokens before, are the
            model's own, which greedy self-speculation keeps.
    """

    loss: float
    accepted: float


class AheadSums:
    """Measures every depth on forward passes that are made for other measurements, over all of them together.

    The model's own guesses are those that it makes on the text; the text's tokens stand for those accepted before.

    Args:
        model: has a block.
        block: its block.
        depths: how many.
    """

    def __init__(self, model: PreTrainedModel, block: AheadBlock, *, depths: int) -> None:
        self._model, self._block, self._depths = model, block, depths
        self._sums = torch.zeros(depths, 3, dtype=torch.float64)

    def add(self, hidden_BLH: Tensor, logits_BLV: Tensor, labels_BL: Tensor) -> None:
        """Count a batch.

        Args:
            hidden_BLH: what the model's head took.
            logits_BLV: what it made of it.
            labels_BL: the token after each position.
        """
        own_BL = logits_BLV.argmax(-1)
        kept_BL = torch.ones_like(labels_BL, dtype=torch.bool)
        ahead = ahead_logits(self._model, self._block, hidden_BLH, labels_BL, depths=self._depths)
        for depth, (guesses, tokens) in enumerate(ahead):
            kept_BL = kept_BL[:, :-1] & (guesses.argmax(-1) == own_BL[:, depth + 1 :])
            loss = F.cross_entropy(guesses.flatten(0, 1).float(), tokens.flatten(), reduction="sum")
            counted = [float(loss), float(kept_BL.sum()), tokens.numel()]
            self._sums[depth] += torch.tensor(counted, dtype=torch.float64)

    def measured(self) -> list[Ahead]:
        """What was measured, by depth."""
        return [Ahead(float(loss / count), float(kept / count)) for loss, kept, count in self._sums]


def ahead_sums(model: PreTrainedModel, *, depths: int) -> AheadSums | None:
    """What measures the block of a model; None where it has none."""
    block = ahead_block(model)
    return AheadSums(model, block, depths=depths) if block else None
