"""The zeros of a portable checkpoint: left out of a model that is loaded to be trained, put in where one is written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from upcycle.arch.padding import ALMOST_ZERO, ALMOST_ZERO_IN_FLOAT16, PADDED
from upcycle.checkpoint import open_reader
from upcycle.errors import SourceError
from upcycle.models.config import load_config

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel

    from upcycle.arch.target import Target


def without_padding(directory: Path, target: Target) -> Any:
    """The transformers configuration of a checkpoint as it is without what `portable=true` added to it.

    Raises:
        SourceError: what config.json calls padding is not zero, because something else has trained it.
    """
    config = load_config(directory)
    padded = getattr(config, PADDED, None)
    if not padded or target.padding is None:
        return config
    endings = target.padding.endings(padded, target.layout.shared.values())
    reader = open_reader(directory)
    trained = [name for name in reader.tensors if name.endswith(endings) and reader.read(name).any()]
    if trained:
        raise SourceError(
            f"the checkpoint says that {', '.join(padded)} of config.json are for zeros alone, and they are not",
            found=f"{trained[0]} with other values" + (f", and {len(trained) - 1} more" if len(trained) > 1 else ""),
            expected="zeros, as upcycle writes them",
            remedy=f"delete {PADDED} from config.json: then they are trained as the model's own",
        )
    for name, value in padded.items():
        setattr(config, name, value)
    delattr(config, PADDED)
    return config


def with_padding(model: PreTrainedModel, target: Target) -> PreTrainedModel:
    """A model with the weights of `model`, its type's padding and a head of its own. It is for writing alone."""
    if target.padding is None:
        return model
    config = type(model.config).from_dict(model.config.to_dict())
    for name, value in target.padding.fields(config.to_dict()).items():
        setattr(config, name, value)
    config.tie_word_embeddings = False
    with torch.device("meta"):
        padded: PreTrainedModel = type(model)._from_config(config, dtype=model.dtype)
    own = model.state_dict()
    values = {name: _fitting(own.get(name), like) for name, like in padded.state_dict().items()}
    gates = [name for name in values if target.layout.shared_gate and name.endswith(target.layout.shared_gate)]
    for name in gates:
        if not values[name].any():
            smallest = ALMOST_ZERO_IN_FLOAT16 if model.dtype == torch.float16 else ALMOST_ZERO
            values[name] = torch.full_like(values[name], smallest)
    if target.padding.head in values:
        values[target.padding.head] = values[target.padding.head].clone()  # what shares memory is not written twice
    padded.load_state_dict(values, assign=True)
    return padded


def _fitting(value: Tensor | None, like: Tensor) -> Tensor:
    """The model's own tensor, or zeros where it has none, or one without elements."""
    if value is not None and value.numel():
        assert value.shape == like.shape
        return value
    return torch.zeros(like.shape, dtype=like.dtype)
