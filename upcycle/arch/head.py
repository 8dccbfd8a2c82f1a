"""What a model's last hidden states go into: logits of the next token, or scores of attributes. Knows names alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

REGRESSION = "regression"  # of transformers' problem types
# What NeMo calls the head of a regression reward model; its bias has no place in transformers' `score`.
NEMO_WEIGHT, NEMO_BIAS = "rm_head.weight", "rm_head.bias"
# The heads with nine rows: HelpSteer's five attributes (arXiv 2406.08673) follow four that were never trained.
NEMO_ATTRIBUTES = (
    *("quality", "toxicity", "humor", "creativity"),
    *("helpfulness", "correctness", "coherence", "complexity", "verbosity"),
)
# In config.json, by attribute: what is added to a score, for a head that had a bias.
OFFSETS = "upcycle_score_offsets"


@dataclass(frozen=True, kw_only=True)
class Head:
    """A head.

    Attributes:
        name: what it is called here.
        tensor: its weight, on disk and in memory.
        shape: of that, in the symbols of `Family`; L is the number of attributes.
        suffix: what the names of transformers' classes end with.
        auto: transformers' Auto class.
        mapping: the table behind that.
        ties: whether it can be the embedding.
    """

    name: str
    tensor: str
    shape: str
    suffix: str
    auto: str
    mapping: str
    ties: bool

    def architecture(self, causal: str) -> str:
        """The class with this head of a model whose causal class is named."""
        return causal.removesuffix(CAUSAL.suffix) + self.suffix


CAUSAL = Head(
    name="causal",
    tensor="lm_head.weight",
    shape="V H",
    suffix="ForCausalLM",
    auto="AutoModelForCausalLM",
    mapping="MODEL_FOR_CAUSAL_LM_MAPPING",
    ties=True,
)
REWARD = Head(
    name="reward",
    tensor="score.weight",
    shape="L H",
    suffix="ForSequenceClassification",
    auto="AutoModelForSequenceClassification",
    mapping="MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    ties=False,
)


def head_of(fields: Mapping[str, Any]) -> Head:
    """The head that `architectures` of config.json names; causal where it names none."""
    named = fields.get("architectures") or ()
    return REWARD if any(str(each).endswith(REWARD.suffix) for each in named) else CAUSAL


def label_fields(attributes: Sequence[str], problem_type: str | None = None) -> dict[str, Any]:
    """The fields of config.json that name a reward head's attributes.

    Without `problem_type`, transformers takes several labels in floating point for a multi-label classification, whose
    loss is a binary cross entropy.
    """
    return {
        "id2label": dict(enumerate(attributes)),
        "label2id": {name: index for index, name in enumerate(attributes)},
        "problem_type": problem_type or REGRESSION,
    }


def head_fields(head: Head, config: Any) -> dict[str, Any]:
    """The fields of config.json that belong to a model's head, from its transformers configuration."""
    if head is CAUSAL:
        return {}
    offsets = getattr(config, OFFSETS, None)
    labels = label_fields(attributes_of(config), config.problem_type)
    return {**labels, **({OFFSETS: offsets} if offsets else {})}


def attributes_of(config: Any) -> tuple[str, ...]:
    """The attributes of a reward model's transformers configuration, in the order of the head's rows."""
    names = {int(index): str(name) for index, name in config.id2label.items()}
    return tuple(names[index] for index in sorted(names))


def score_offsets(config: Any) -> tuple[float, ...]:
    """What is added to each score of a reward model."""
    offsets: Mapping[str, float] = getattr(config, OFFSETS, None) or {}
    return tuple(float(offsets.get(name, 0.0)) for name in attributes_of(config))
