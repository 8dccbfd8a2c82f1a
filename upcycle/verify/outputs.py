"""What two models give for the same tokens, compared: distributions of the next token, or scores of attributes.

Shapes: T positions, V vocabulary, L attributes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch.nn import functional as F

from upcycle.arch.head import CAUSAL, REWARD
from upcycle.models.heads import score_module
from upcycle.routing.ratios import ratio

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from upcycle.arch.head import Head

ROWS_AT_ONCE = 256


class Outputs(Protocol):
    """Sums over positions of how far the MoE is from the dense model."""

    def of(self, model: PreTrainedModel, ids: Tensor) -> Tensor:
        """What a model gives for token ids [1, T], by position, of which all or all but the last count."""

    def compare(self, dense: Tensor, moe: Tensor, ids: Tensor) -> None:
        """Add what `of` gave of both."""

    def found(self, tolerance: float) -> dict[str, Any]:
        """Plain data for the report; `passed` among it."""


@dataclass(kw_only=True)
class NextTokens:
    """Of causal language models.

    Attributes:
        tokens: predicted tokens.
        dense_loss, moe_loss: negative log-likelihood in nats.
        kl: KL(dense || MoE) of the next-token distributions in nats.
        agreed: tokens with the same most likely continuation.
    """

    tokens: int = 0
    dense_loss: float = 0.0
    moe_loss: float = 0.0
    kl: float = 0.0
    agreed: int = 0

    def of(self, model: PreTrainedModel, ids: Tensor) -> Tensor:
        return model(input_ids=ids).logits[0, :-1]  # type: ignore[no-any-return]

    def compare(self, dense: Tensor, moe: Tensor, ids: Tensor) -> None:
        for rows in range(0, len(dense), ROWS_AT_ONCE):
            part = slice(rows, rows + ROWS_AT_ONCE)
            self._add(dense[part], moe[part], ids[0, 1:][part])

    def _add(self, dense: Tensor, moe: Tensor, targets: Tensor) -> None:
        log_dense, log_moe = dense.double().log_softmax(-1), moe.double().log_softmax(-1)
        self.tokens += len(targets)
        self.dense_loss += float(F.nll_loss(log_dense, targets, reduction="sum"))
        self.moe_loss += float(F.nll_loss(log_moe, targets, reduction="sum"))
        self.kl += float(F.kl_div(log_moe, log_dense, log_target=True, reduction="sum"))
        self.agreed += int((log_dense.argmax(-1) == log_moe.argmax(-1)).sum())

    def found(self, tolerance: float) -> dict[str, Any]:
        dense_loss, moe_loss = self.dense_loss / self.tokens, self.moe_loss / self.tokens
        return {
            "dense_loss": dense_loss,
            "moe_loss": moe_loss,
            "loss_gap": ratio(moe_loss - dense_loss, dense_loss),
            "kl": self.kl / self.tokens,
            "top1_agreement": self.agreed / self.tokens,
            "passed": abs(moe_loss - dense_loss) <= tolerance * dense_loss,
        }


@dataclass(kw_only=True)
class Scores:
    """Of reward models, at every position.

    Attributes:
        scores: how many.
        error, norm: squared norms of their difference, and of the dense model's.
        largest: the largest difference.
    """

    scores: int = 0
    error: float = 0.0
    norm: float = 0.0
    largest: float = 0.0

    def of(self, model: PreTrainedModel, ids: Tensor) -> Tensor:
        """Scores [T, L], of which the model itself keeps the last position's."""
        seen: list[Tensor] = []
        hook = score_module(model).register_forward_hook(lambda _module, _args, output: seen.append(output[0]))
        try:
            model(input_ids=ids)
        finally:
            hook.remove()
        return seen[0]

    def compare(self, dense: Tensor, moe: Tensor, _ids: Tensor) -> None:
        difference = moe.double() - dense.double()
        self.scores += difference.numel()
        self.error += float(difference.square().sum())
        self.norm += float(dense.double().square().sum())
        largest = float(difference.abs().max())
        self.largest = largest if math.isnan(largest) else max(self.largest, largest)

    def found(self, tolerance: float) -> dict[str, Any]:
        # As the gap of a loss, it is quadratic in the error: what a squared loss would grow by.
        gap = ratio(self.error, self.norm)
        return {
            "score_rms": math.sqrt(self.norm / self.scores),
            "score_rms_error": math.sqrt(self.error / self.scores),
            "score_max_error": self.largest,
            "score_gap": gap,
            "passed": gap is not None and gap <= tolerance,
        }


OUTPUTS: dict[str, type[NextTokens] | type[Scores]] = {CAUSAL.name: NextTokens, REWARD.name: Scores}


def outputs_of(head: Head) -> Outputs:
    """The comparison of models with a head."""
    return OUTPUTS[head.name]()
