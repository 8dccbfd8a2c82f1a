"""Scores of held-out texts against their labels. Knows models, rows, and the ranks that share a model.

Shapes: R rows, A attributes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset

from upcycle.arch.head import score_offsets
from upcycle.data.rated import MASK
from upcycle.distributed.ranks import ALONE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from transformers import PreTrainedModel

    from upcycle.data.rated_corpus import RatedRows
    from upcycle.distributed.ranks import Ranks


@torch.no_grad()
def held_out_scores(
    model: PreTrainedModel, held_out: RatedRows, *, batch_size: int, rows: int | None, ranks: Ranks = ALONE
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What a reward model, in evaluation mode, gives for rows, offsets added; and their labels: both [R, A].

    Args:
        model: left in the mode it was in.
        held_out: the rows.
        batch_size: rows per forward pass.
        rows: used, from the first; None takes all.
        ranks: the processes over which the model is laid out; each scores its share of the rows.
    """
    device, training = next(model.parameters()).device, model.training
    used = len(held_out) if rows is None else min(rows, len(held_out))
    # A rank with a row less than others goes along with their forward passes, with one that it has had.
    share = [index % used for index in range(ranks.data_rank, used + ranks.data_rank, ranks.layout.data)]
    model.eval()
    found = []
    for batch in DataLoader(Subset(held_out, share), batch_size=batch_size):
        inputs = {name: values.to(device) for name, values in batch.items() if name != "labels"}
        found.append(model(**inputs, use_cache=False).logits.double().cpu())
    model.train(training)
    scores_RA = np.zeros((used, held_out.labels_RA.shape[1]))
    for indices, scores in ranks.gather((share, torch.cat(found).numpy())):
        scores_RA[indices] = scores
    return scores_RA + np.array(score_offsets(model.config)), held_out.labels_RA[:used].double().numpy()


def row_errors(scores_RA: NDArray[np.float64], labels_RA: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean squared error of each row over its labels, [R]."""
    known = labels_RA != MASK
    squares = np.where(known, (scores_RA - labels_RA) ** 2, 0.0)
    return np.asarray(squares.sum(1) / known.sum(1))


def attribute_metrics(
    scores_RA: NDArray[np.float64], labels_RA: NDArray[np.float64], attributes: Sequence[str]
) -> dict[str, dict[str, float | None]]:
    """Of each attribute that has labels: `pearson`, `spearman` and `mse`; a correlation is None where there is none."""
    found: dict[str, dict[str, float | None]] = {}
    for index, name in enumerate(attributes):
        known = labels_RA[:, index] != MASK
        if known.any():
            scores, labels = scores_RA[known, index], labels_RA[known, index]
            found[name] = {
                "pearson": correlation(scores, labels),
                "spearman": correlation(ranked(scores), ranked(labels)),
                "mse": float(((scores - labels) ** 2).mean()),
            }
    return found


def correlation(one: NDArray[np.float64], other: NDArray[np.float64]) -> float | None:
    """Pearson's correlation; None where one of them does not vary, or is not finite."""
    a, b = one - one.mean(), other - other.mean()
    size = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / size if np.isfinite(size) and size > 0 else None


def ranked(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks from 0, equal values sharing the mean of theirs, as Spearman's correlation takes them."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = counts.cumsum()
    return np.asarray((ends - (counts + 1) / 2)[inverse])
