"""Every metric that training reports: name, unit, and how a run's rows are reduced to one number.

Knows nothing else. A name with `{domain}`, `{attribute}`, `{ahead}` or `{layer}` stands for one metric per domain,
attribute, token ahead or MoE layer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Reduction = Literal["last", "min", "max", "mean", "sum"]
_PLACEHOLDER = re.compile(r"\{\w+\}")
SCHEMA_VERSION = 1  # of run.json and metrics.jsonl; raised when what a name in them means changes


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A metric.

    Attributes:
        name: as it stands in the record.
        unit: what one of it is.
        reduction: how the rows of a run become its summary.
        meaning: one line.
    """

    name: str
    unit: str
    reduction: Reduction
    meaning: str


def _metric(name: str, unit: str, reduction: Reduction, meaning: str) -> Metric:
    return Metric(name=name, unit=unit, reduction=reduction, meaning=meaning)


METRICS = (
    _metric("train/loss", "nats/token", "last", "cross entropy, mean over the tokens since the last row"),
    _metric("train/perplexity", "1", "last", "exp(train/loss)"),
    _metric(
        "train/mse", "label²", "last", "objective=regression: squared error, mean over the samples since the last row"
    ),
    _metric("train/aux_loss", "1", "last", "Switch load-balancing loss before its coefficient; 1 is balanced"),
    _metric("train/z_loss", "1", "last", "mean squared log-sum-exp of the router's logits, before its coefficient"),
    _metric("train/distill_loss", "nats/token", "last", "KL of the student from the teacher, before its weight"),
    _metric("train/mtp_loss", "nats/token", "last", "cross entropy of the tokens after the next one, mean over depths"),
    _metric("train/mtp_aux_loss", "1", "last", "train/aux_loss of the layers for multi-token prediction"),
    _metric("train/mtp_z_loss", "1", "last", "train/z_loss of the layers for multi-token prediction"),
    _metric("train/grad_norm", "1", "mean", "global L2 norm of the gradient before clipping"),
    _metric("train/learning_rate", "1", "last", "of the last step, before factors for router and experts"),
    _metric("train/tokens", "tokens", "last", "tokens trained on"),
    _metric("train/flops", "FLOP", "last", "training FLOPs spent, analytic, forward and backward"),
    _metric("train/tokens_per_second", "tokens/s", "mean", "throughput since the last row, validation left out"),
    _metric("train/mfu", "1", "mean", "model FLOPs utilisation: FLOP/s over the device's peak, if it is known"),
    _metric("train/step_seconds", "s", "mean", "time of one optimizer step, validation left out"),
    _metric("val/loss", "nats/token", "last", "cross entropy over all held-out windows used"),
    _metric("val/loss_unquantised", "nats/token", "last", "val/loss of the same weights without low precision"),
    _metric("val/mse_unquantised", "label²", "last", "val/mse of the same weights without low precision"),
    _metric("val/perplexity", "1", "last", "exp(val/loss)"),
    _metric("val/mtp_loss", "nats/token", "last", "cross entropy of the second token ahead, the one after the next"),
    _metric("val/mtp_{ahead}/loss", "nats/token", "last", "cross entropy of the token so many ahead, from 2"),
    _metric(
        "val/mtp_{ahead}/accepted", "1", "last", "share of such guesses, and of those before, that are the model's own"
    ),
    _metric("val/{domain}/loss", "nats/token", "last", "cross entropy by domain"),
    _metric("val/{domain}/nats_per_byte", "nats/byte", "last", "cross entropy by domain, per byte of text"),
    _metric("val/mse", "label²", "last", "objective=regression: squared error, mean over the held-out rows used"),
    _metric("val/{attribute}/mse", "label²", "last", "squared error by attribute, over the rows that have a label"),
    _metric("val/{attribute}/pearson", "1", "last", "Pearson's correlation of scores with labels, by attribute"),
    _metric("val/{attribute}/spearman", "1", "last", "Spearman's correlation of scores with labels, by attribute"),
    _metric("moe/max_vio", "1", "last", "largest expert load over the mean, minus 1; mean over layers"),
    _metric("moe/load_entropy", "1", "last", "entropy of the load over experts, over its maximum; mean over layers"),
    _metric("moe/dead_experts", "experts", "last", "experts that got no token since the last row, over all layers"),
    _metric("moe/dropped_share", "1", "last", "share of (token, expert) pairs dropped for capacity"),
    _metric("moe/router_entropy", "nats", "last", "entropy of the router's distribution; mean over tokens and layers"),
    _metric("moe/selected_mass", "1", "last", "probability of the selected experts; mean over tokens and layers"),
    _metric("moe/whole_ffns", "1", "last", "share of tokens whose experts make whole FFNs; mean over layers"),
    _metric("moe/dense_cosine", "1", "last", "cosine of an expert to the dense shard it came from; mean"),
    _metric("moe/group_cosine", "1", "last", "cosine between experts that came from the same shard; mean"),
    _metric("moe/layer_{layer}/load", "1", "last", "share of the tokens' choices that each expert got, a list"),
    _metric("moe/layer_{layer}/max_vio", "1", "last", "moe/max_vio of one layer"),
    _metric("moe/layer_{layer}/load_entropy", "1", "last", "moe/load_entropy of one layer"),
    _metric("moe/layer_{layer}/dead_experts", "experts", "last", "moe/dead_experts of one layer"),
    _metric("moe/layer_{layer}/dropped_share", "1", "last", "moe/dropped_share of one layer"),
    _metric("moe/layer_{layer}/router_entropy", "nats", "last", "moe/router_entropy of one layer"),
    _metric("moe/layer_{layer}/selected_mass", "1", "last", "moe/selected_mass of one layer"),
    _metric("moe/layer_{layer}/whole_ffns", "1", "last", "moe/whole_ffns of one layer"),
    _metric("moe/layer_{layer}/dense_cosine", "1", "last", "cosine of each expert to its dense shard, a list"),
    _metric("moe/layer_{layer}/group_cosine", "1", "last", "moe/group_cosine of one layer"),
    _metric("mtp/layer_{layer}/load", "1", "last", "moe/layer_{layer}/load of a layer of the mtp block"),
    _metric("mtp/layer_{layer}/max_vio", "1", "last", "moe/max_vio of a layer of the mtp block"),
    _metric("mtp/layer_{layer}/load_entropy", "1", "last", "moe/load_entropy of a layer of the mtp block"),
    _metric("mtp/layer_{layer}/dead_experts", "experts", "last", "moe/dead_experts of a layer of the mtp block"),
    _metric("mtp/layer_{layer}/dropped_share", "1", "last", "moe/dropped_share of a layer of the mtp block"),
    _metric("mtp/layer_{layer}/router_entropy", "nats", "last", "moe/router_entropy of a layer of the mtp block"),
    _metric("mtp/layer_{layer}/selected_mass", "1", "last", "moe/selected_mass of a layer of the mtp block"),
    _metric("mtp/layer_{layer}/whole_ffns", "1", "last", "moe/whole_ffns of a layer of the mtp block"),
)


def metric(name: str) -> Metric | None:
    """The metric of the schema that a name in the record belongs to; None for a name that the schema does not know."""
    return next((each for each in METRICS if re.fullmatch(_PLACEHOLDER.sub(".+", each.name), name)), None)
