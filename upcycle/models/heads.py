"""The head of a model: which one a source has, transformers' class for it, and a new one of a reward model."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from upcycle.arch.head import (
    NEMO_ATTRIBUTES,
    NEMO_BIAS,
    NEMO_WEIGHT,
    OFFSETS,
    REWARD,
    attributes_of,
    head_fields,
    head_of,
    label_fields,
)
from upcycle.errors import ConfigError, SourceError, listed
from upcycle.init.experts import normal
from upcycle.init.rng import generator

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from upcycle.arch.family import Shape
    from upcycle.arch.head import Head

SCORE = REWARD.tensor
BIASES = ("score.bias", NEMO_BIAS)


def stored_head(config: Any, names: Collection[str]) -> Head:
    """The head of a dense model: what config.json says, or where it names no class, what is stored.

    Args:
        config: the model's transformers configuration.
        names: of the stored tensors.

    Raises:
        SourceError: a reward model without its head, or of a type that transformers has no such class for.
    """
    head, scores = head_of(config.to_dict()), {SCORE, NEMO_WEIGHT} & set(names)
    if NEMO_WEIGHT in scores or (scores and not config.architectures):
        head = REWARD
    if head is not REWARD:
        return head
    if names and not scores:
        raise SourceError(
            "config.json says that this is a reward model, and its head is not stored",
            found=f"architectures={config.architectures} without {SCORE}",
            expected=f"{SCORE}, or NeMo's {NEMO_WEIGHT}",
            remedy="take the complete checkpoint; a new head is trained from the language model itself, with upcycle "
            "train objective=regression",
        )
    check_class(head, config)
    return head


def settle_reward(config: Any, shapes: Mapping[str, Shape | None], read: Any) -> None:
    """Say in a reward model's transformers configuration all that its head is: labels, loss, offsets.

    Labels of a head of NeMo's with nine rows are NeMo's nine, where config.json names none.

    Args:
        config: the configuration, which is changed.
        shapes: of the stored tensors.
        read: returns a stored tensor; None where none can be read.

    Raises:
        SourceError: as many labels in config.json as the head has no rows.
    """
    shape = shapes.get(SCORE, shapes.get(NEMO_WEIGHT))
    rows = shape[0] if shape else config.num_labels
    if rows == len(NEMO_ATTRIBUTES) and NEMO_WEIGHT in shapes and unnamed(attributes_of(config)):
        _update(config, label_fields(NEMO_ATTRIBUTES))
    if rows != config.num_labels:
        raise SourceError(
            "the head has another number of attributes than config.json",
            found=f"{rows} rows, id2label: {listed(attributes_of(config))}",
            expected=f"{rows} labels",
            remedy="set id2label in config.json to the names of the head's rows, in their order",
        )
    _update(config, head_fields(REWARD, config))
    config.tie_word_embeddings = False  # nothing is tied to the embedding
    bias = head_bias(shapes)
    if bias and read:
        added = dict(zip(attributes_of(config), read(bias).float().tolist(), strict=True))
        setattr(config, OFFSETS, added)


def head_bias(names: Collection[str]) -> str | None:
    """The stored bias of a reward head, which transformers' has not."""
    return next((name for name in BIASES if name in names), None)


def unnamed(attributes: Sequence[str]) -> bool:
    """Whether labels are those that transformers makes up."""
    return all(name.startswith("LABEL_") for name in attributes)


def class_of(head: Head, config: Any) -> Any:
    """Transformers' class of a model with a head.

    Raises:
        SourceError: there is none.
    """
    check_class(head, config)
    import transformers

    return getattr(transformers, head.mapping)[type(config)]


def auto_class(head: Head) -> Any:
    """Transformers' Auto class for a head."""
    import transformers

    return getattr(transformers, head.auto)


def check_class(head: Head, config: Any) -> None:
    """Check that transformers has a class of a model with a head.

    Raises:
        SourceError: it has none.
    """
    import transformers

    if type(config) not in getattr(transformers, head.mapping):
        raise SourceError(
            f"transformers has no {config.model_type} with a {head.name} head",
            found=f"model_type={config.model_type}",
            expected=f"a type with a class …{head.suffix}",
            remedy="take a model of another type, such as llama or qwen3",
        )


def with_scores(config: Any, attributes: Sequence[str]) -> Any:
    """A copy of a model's transformers configuration, for the same model with a reward head.

    Raises:
        SourceError: transformers has no such class.
    """
    made = deepcopy(config)
    _update(made, label_fields(attributes))
    made.architectures = [class_of(REWARD, made).__name__]
    made.tie_word_embeddings = made.get_text_config().tie_word_embeddings = False
    if getattr(made, "auto_map", None):
        del made.auto_map  # of the class with the other head; what is saved names its own
    return made


def is_score(name: str) -> bool:
    """Whether a tensor, by its name in memory, is a reward head."""
    return name == SCORE or name.endswith(f".{SCORE}")


def score_module(model: PreTrainedModel) -> nn.Module:
    """A reward model's head."""
    found: nn.Module = next(each for name, each in model.named_modules() if is_score(f"{name}.weight"))
    return found


@torch.no_grad()
def draw_head(model: PreTrainedModel, *, seed: int) -> None:
    """Draw a reward model's head anew, as normal as all its matrices at their start, by the seed alone."""
    weight = score_module(model).get_parameter("weight")
    std = model.config.get_text_config().initializer_range
    rows, columns = weight.shape
    values = torch.cat(list(normal(rows, columns, std=std, repeat=1, values=generator(seed, SCORE))))
    if isinstance(weight, DTensor):
        values = distribute_tensor(values.to(weight.device), weight.device_mesh, weight.placements)
    weight.copy_(values)


def settle_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a reward model a padding token, which decides where it scores, if it has none: the tokenizer's."""
    text = model.config.get_text_config()
    known = text.pad_token_id
    if known is not None and 0 <= known < text.vocab_size:
        return
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    # A model inside another one has a copy of its config.
    for module in model.modules():
        if (config := getattr(module, "config", None)) is not None:
            config.get_text_config().pad_token_id = padding


def check_labels(config: Any, attributes: Sequence[str]) -> None:
    """Check that a reward model has a score for every attribute.

    Raises:
        ConfigError: it has not.
    """
    known = attributes_of(config)
    strange = [name for name in attributes if name not in known]
    if strange:
        raise ConfigError(
            "the data has attributes that the reward model does not score",
            found=f"{listed(strange)}; the model's: {listed(known)}",
            expected="attributes among the model's labels",
            remedy="name the data's columns as id2label of the model's config.json does, or leave them out of "
            "data.attributes",
        )


def _update(config: Any, fields: Mapping[str, Any]) -> None:
    for name, value in fields.items():
        setattr(config, name, value)
