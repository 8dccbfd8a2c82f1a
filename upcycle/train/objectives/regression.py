"""Scores of attributes: squared error over the labels that are there (Nemotron-4-340B-Reward, arXiv 2406.08673).

Shapes: B samples, A attributes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from upcycle.arch.head import attributes_of, score_offsets
from upcycle.data.rated import MASK
from upcycle.data.rated_corpus import build_rated
from upcycle.errors import ConfigError
from upcycle.evaluation.scores import attribute_metrics, held_out_scores, row_errors
from upcycle.train.objectives.objective import LOSS, Batch, Kind, Row, model_inputs

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from upcycle.data.rated_corpus import RatedCorpus
    from upcycle.distributed.ranks import Ranks
    from upcycle.train.config import TrainConfig
    from upcycle.train.start import Start


class Regression:
    """Mean over samples of the mean squared error over a sample's labels, so that each sample counts the same.

    The score is transformers': of the last token that is not padding.

    Args:
        corpus: texts with attributes, some of which may be held out.
        offsets: what is added to each score.
    """

    criterion = "val/mse"

    def __init__(self, corpus: RatedCorpus, offsets: tuple[float, ...]) -> None:
        self._corpus, self._offsets = corpus, offsets

    def loss(self, model: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
        scores_BA = model(**model_inputs(batch), use_cache=False).logits.float()
        error = masked_error(scores_BA + scores_BA.new_tensor(self._offsets), batch["labels"])
        return {LOSS: error, "squared_error": error}

    def tokens(self, batch: Batch) -> int:
        return int(batch["attention_mask"].sum())

    def row(self, parts: dict[str, float]) -> Row:
        return {"train/mse": parts.pop("squared_error")}

    def held_out(self, model: PreTrainedModel, *, batch_size: int, samples: int | None, ranks: Ranks) -> Row:
        (rows,) = self._corpus.held_out.values()
        scores, labels = held_out_scores(model, rows, batch_size=batch_size, rows=samples, ranks=ranks)
        row = {self.criterion: float(row_errors(scores, labels).mean())}
        for attribute, found in attribute_metrics(scores, labels, self._corpus.attributes).items():
            row |= {f"val/{attribute}/{name}": value for name, value in found.items() if value is not None}
        return row


def masked_error(scores_BA: Tensor, labels_BA: Tensor) -> Tensor:
    """Mean over samples of the mean squared error over their labels; every sample has one."""
    known_BA = labels_BA != MASK
    squares_BA = (scores_BA - labels_BA).square().masked_fill(~known_BA, 0.0)
    return (squares_BA.sum(-1) / known_BA.sum(-1)).mean()


def _check(config: TrainConfig) -> None:
    config.data.rated()
    if config.distill.weight:
        raise ConfigError(
            "distillation is of distributions of the next token",
            found=f"distill.weight={config.distill.weight:g} with objective=regression",
            remedy="set distill.weight=0",
        )
    if config.mtp.start != "none":
        raise ConfigError(
            "multi-token prediction is of language models",
            found=f"mtp.start={config.mtp.start} with objective=regression",
            remedy="set mtp.start=none",
        )
    if config.router.capacity_factor is not None or config.router.expert_choice:
        raise ConfigError(
            "padding would take the places of tokens",
            found="router.capacity_factor or router.expert_choice with objective=regression, whose batches are padded",
            expected="routing without a capacity",
            remedy="set router.capacity_factor=null and router.expert_choice=false",
        )


def _samples(config: TrainConfig, start: Start) -> RatedCorpus:
    text = start.model.config.get_text_config()
    return build_rated(
        config.data,
        start.tokenizer,
        attributes=attributes_of(start.model.config),
        padding=text.pad_token_id,
        sequence_length=config.sequence_length,
    )


def _make(_config: TrainConfig, start: Start, corpus: RatedCorpus) -> Regression:
    return Regression(corpus, score_offsets(start.model.config))


KIND = Kind(attributes=lambda config: config.data.rated(), check=_check, samples=_samples, make=_make)
