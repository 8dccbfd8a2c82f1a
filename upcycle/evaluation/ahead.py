"""How well a block for multi-token prediction predicts, and how often the model would accept its guesses.

Shapes: B windows, L tokens, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.data import ConcatDataset, DataLoader, Subset

from upcycle.models.ahead import ahead_block, ahead_logits, before_head

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel

    from upcycle.data.windows import Windows


class Ahead(NamedTuple):
    """One depth on held-out text.

    Attributes:
        loss: cross entropy in nats per token.
        accepted: share of positions at which the block's best guess, and its guesses for the tokens before, are the
            model's own, which greedy self-speculation keeps.
    """

    loss: float
    accepted: float


@torch.no_grad()
def ahead_metrics(
    model: PreTrainedModel, held_out: Mapping[str, Windows], *, batch_size: int, windows: int | None, depths: int
) -> list[Ahead]:
    """Measure every depth, over all domains together; empty where the model has no block.

    The model's own guesses are those that it makes on the text; the text's tokens stand for those accepted before.

    Args:
        model: left in the mode it was in.
        held_out: windows by domain.
        batch_size: windows per forward pass.
        windows: windows used per domain, from the first; None takes all.
        depths: how many.
    """
    block = ahead_block(model)
    if block is None:
        return []
    training, device = model.training, next(model.parameters()).device
    model.eval()
    sums = torch.zeros(depths, 3, dtype=torch.float64)
    used = [Subset(each, range(min(windows or len(each), len(each)))) for each in held_out.values()]
    for batch in DataLoader(ConcatDataset(used), batch_size=batch_size):
        inputs = {name: values.to(device) for name, values in batch.items()}
        labels_BL = inputs.pop("labels")
        with before_head(model) as hidden:
            own_BL = model(**inputs, use_cache=False).logits.argmax(-1)
        kept_BL = torch.ones_like(labels_BL, dtype=torch.bool)
        for depth, (logits, tokens) in enumerate(ahead_logits(model, block, hidden[0], labels_BL, depths=depths)):
            kept_BL = kept_BL[:, :-1] & (logits.argmax(-1) == own_BL[:, depth + 1 :])
            loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten(), reduction="sum")
            sums[depth] += torch.tensor([float(loss), float(kept_BL.sum()), tokens.numel()], dtype=torch.float64)
    model.train(training)
    return [Ahead(float(loss / count), float(kept / count)) for loss, kept, count in sums]
