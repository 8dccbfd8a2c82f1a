"""The head that an objective trains: the one that a model has, or a new one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from upcycle.arch.head import CAUSAL, REGRESSION, attributes_of
from upcycle.errors import ConfigError
from upcycle.models.heads import check_labels, unnamed, with_scores

if TYPE_CHECKING:
    from upcycle.arch.head import Head


def new_head(config: Any, head: Head, attributes: tuple[str, ...] | None) -> Any | None:
    """A model's transformers configuration with a new reward head; None where its own head is what is trained.

    Args:
        config: the model's, as it is.
        head: the model's, as it is.
        attributes: that are to be scored; None for a causal language model.

    Raises:
        ConfigError: a reward model that is to be trained as a language model, as a classifier, or for attributes that
            it has no scores of.
        SourceError: transformers has no such model with a reward head.
    """
    if attributes is None:
        if head is not CAUSAL:
            raise ConfigError(
                "objective=causal_lm trains language models",
                found=f"a reward model with scores of {', '.join(attributes_of(config))}",
                expected="a model with the head lm_head",
                remedy="set objective=regression, with data that has attributes",
            )
        return None
    if head is CAUSAL:
        return with_scores(config, attributes)
    if config.problem_type not in (None, REGRESSION):
        raise ConfigError(
            "objective=regression trains scores, and the source is a classifier",
            found=f"problem_type={config.problem_type} in config.json",
            expected=f"problem_type={REGRESSION}",
            remedy="give the language model itself, for a new head",
        )
    if unnamed(attributes_of(config)):
        raise ConfigError(
            "config.json does not say what the reward model scores",
            found=f"id2label: {', '.join(attributes_of(config))}",
            expected=f"names among which are {', '.join(attributes)}",
            remedy="set id2label in config.json to the names of the head's rows, in their order",
        )
    check_labels(config, attributes)
    return None
