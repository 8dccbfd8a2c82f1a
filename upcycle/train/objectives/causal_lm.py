"""The next token: cross entropy, and distillation from the dense source.

Shapes: B sequences, L tokens, V vocabulary.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upcycle.data.corpus import build_corpus
from upcycle.errors import ConfigError
from upcycle.evaluation.ahead import ahead_sums
from upcycle.evaluation.losses import domain_losses, perplexity
from upcycle.models.ahead import ahead_block, ahead_logits, before_head
from upcycle.models.load import load_dense
from upcycle.train.objectives.objective import LOSS, Batch, Kind, Row, model_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from upcycle.data.corpus import Corpus
    from upcycle.distributed.ranks import Ranks
    from upcycle.train.config import DistillConfig, MtpConfig, TrainConfig
    from upcycle.train.start import Start


class CausalLm:
    """Cross entropy over the tokens, mixed with the KL from a teacher where there is one.

    Args:
        corpus: the text, some of which may be held out.
        teacher: the dense model to distil from; None without distillation.
        distill, mtp: the options.
    """

    criterion = "val/loss"

    def __init__(self, corpus: Corpus, teacher: PreTrainedModel | None, distill: DistillConfig, mtp: MtpConfig) -> None:
        self._corpus, self._teacher, self._distill, self._mtp = corpus, teacher, distill, mtp

    def loss(self, model: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
        block = ahead_block(model)
        with ExitStack() as watching:
            hidden = watching.enter_context(before_head(model)) if block else []
            logits_BLV = _logits(model, batch)
        cross_entropy = token_loss(logits_BLV, batch["labels"])
        parts, loss = {"cross_entropy": cross_entropy}, cross_entropy
        if self._teacher is not None:
            parts["distill_loss"] = distilled = self.distillation(logits_BLV, batch)
            weight = self._distill.weight
            loss = (1 - weight) * cross_entropy + weight * self._distill.temperature**2 * distilled
        if block:
            ahead = ahead_logits(model, block, hidden[0], batch["labels"], depths=self._mtp.depths)
            parts["mtp_loss"] = torch.stack([token_loss(logits, tokens) for logits, tokens in ahead]).mean()
            loss = loss + self._mtp.weight * parts["mtp_loss"]
        return {LOSS: loss, **parts}

    def tokens(self, batch: Batch) -> int:
        return batch["labels"].numel()

    def row(self, parts: dict[str, float]) -> Row:
        loss = parts.pop("cross_entropy")
        more = {f"train/{name}": parts.pop(name) for name in ("distill_loss", "mtp_loss") if name in parts}
        return {"train/loss": loss, "train/perplexity": math.exp(loss), **more}

    def held_out(self, model: PreTrainedModel, *, batch_size: int, samples: int | None, ranks: Ranks) -> Row:
        held_out = self._corpus.held_out
        ahead = ahead_sums(model, depths=self._mtp.depths)
        losses = domain_losses(model, held_out, batch_size=batch_size, windows=samples, ranks=ranks, ahead=ahead)
        mean = sum(loss * tokens for loss, tokens in losses.values()) / sum(tokens for _, tokens in losses.values())
        row = {self.criterion: mean, "val/perplexity": perplexity(mean)}
        for domain, (loss, _) in losses.items():
            row[f"val/{domain}/loss"] = loss
            row[f"val/{domain}/nats_per_byte"] = loss / self._corpus.bytes_per_token[domain]
        measured = ahead.measured() if ahead else []
        for token, found in enumerate(measured, start=2):
            row |= {f"val/mtp_{token}/loss": found.loss, f"val/mtp_{token}/accepted": found.accepted}
        if measured:
            row["val/mtp_loss"] = measured[0].loss
        return row

    def distillation(self, logits_BLV: Tensor, batch: Batch) -> Tensor:
        """KL of the student from the teacher in nats per token, at the temperature."""
        assert self._teacher
        if self._teacher.device != logits_BLV.device:
            nn.Module.to(self._teacher, logits_BLV.device)
        with torch.no_grad():
            teacher_BLV = _logits(self._teacher, batch)
        temperature = self._distill.temperature
        student, teacher = (
            (logits.flatten(0, 1).float() / temperature).log_softmax(-1) for logits in (logits_BLV, teacher_BLV)
        )
        return F.kl_div(student, teacher, log_target=True, reduction="batchmean")


def token_loss(logits_BLV: Tensor, labels_BL: Tensor) -> Tensor:
    """Mean cross entropy in nats per token; labels are already shifted."""
    return F.cross_entropy(logits_BLV.flatten(0, 1).float(), labels_BL.flatten())


def _logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    return model(**model_inputs(batch), use_cache=False).logits  # type: ignore[no-any-return]


def _check(config: TrainConfig) -> None:
    config.data.sources()
    if config.distill.temperature <= 0:
        raise ConfigError("distill.temperature is out of range", found=config.distill.temperature, expected="above 0")
    if not 0 <= config.distill.weight <= 1:
        raise ConfigError("distill.weight is out of range", found=config.distill.weight, expected="0 to 1")


def _samples(config: TrainConfig, start: Start) -> Corpus:
    return build_corpus(config.data, start.tokenizer, sequence_length=config.sequence_length)


def _make(config: TrainConfig, start: Start, corpus: Corpus) -> CausalLm:
    teacher = None
    if config.distill.weight:
        if start.source is None:
            raise ConfigError("distillation needs a dense source", found="none", remedy="set distill.weight=0")
        teacher = load_dense(start.source).requires_grad_(False)
    return CausalLm(corpus, teacher, config.distill, config.mtp)


KIND = Kind(attributes=lambda _config: None, check=_check, samples=_samples, make=_make)
