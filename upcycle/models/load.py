"""Loads dense and MoE checkpoints through transformers, and finds their FFN blocks."""

from __future__ import annotations

import math
import warnings
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from upcycle.arch.head import NEMO_WEIGHT, REWARD, head_of
from upcycle.errors import ConfigError, SourceError, listed
from upcycle.files.json import check_objects
from upcycle.models.config import load_config
from upcycle.models.heads import auto_class, is_score
from upcycle.options.extras import need

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from upcycle.models.source import DenseSource

# What transformers reads besides config.json and the weights.
GENERATION = ("generation_config.json",)
TOKENIZER = (
    *("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    "vocab.json",
)

SENTENCEPIECE = "tokenizer.model"


def load_dense(
    source: DenseSource, dtype: torch.dtype = torch.float32, *, new_head: Any = None, **layout: Any
) -> PreTrainedModel:
    """The dense model in evaluation mode.

    Args:
        source: the model.
        dtype: of the weights.
        new_head: the transformers configuration of the model with a new reward head; None keeps the head that it has.
        layout: goes to transformers, where the source is a directory.
    """
    model: PreTrainedModel
    config = new_head or source.model.config
    kind = auto_class(REWARD if new_head else source.model.head)
    if source.is_gguf:
        model = kind.from_config(config, dtype=dtype)
        model.load_state_dict({name: source.read(name) for name in source.model.tensors()}, strict=False)
        model.tie_weights()
    else:
        # What NeMo calls the head is a name that transformers does not know.
        names = {"key_mapping": {f"^{NEMO_WEIGHT}$": REWARD.tensor}} if NEMO_WEIGHT in source.stored.values() else {}
        with quietly():
            made = {"config": config, "dtype": dtype, "fresh": bool(new_head), **names}
            model = from_pretrained(kind, source.path, **made, **layout)
    model.eval()
    return model


def load_checkpoint(
    directory: Path, dtype: torch.dtype = torch.float32, *, new_head: Any = None, **layout: Any
) -> PreTrainedModel:
    """Any causal LM or reward model in evaluation mode; a MoE with transformers' loop over experts, for any width.

    Args:
        directory: of the checkpoint.
        dtype: of the weights.
        new_head: the transformers configuration of the model with a new reward head; None keeps the head that it has.
        layout: goes to transformers.

    Raises:
        SourceError: neither, or weights that are damaged or incomplete.
    """
    head = REWARD if new_head else head_of(load_config(directory).to_dict())
    given = {"config": new_head, "fresh": True} if new_head else {}
    with quietly():
        eager = {"dtype": dtype, "experts_implementation": "eager"}
        model = from_pretrained(auto_class(head), directory, **{**eager, **layout, **given})
    model.eval()
    return model


def from_pretrained(kind: Any, place: Path | None, *, fresh: bool = False, **arguments: Any) -> PreTrainedModel:
    """Transformers' `kind.from_pretrained`, with nothing left to chance: every tensor is there, and has its shape.

    Where config.json ties the head to the embedding and another head is stored, transformers keeps both: the model's
    config then says so, and what is made of the model keeps them too.

    Args:
        kind: of transformers' classes.
        place: directory; None where the tensors are given.
        fresh: whether the reward head need not be there.
        arguments: go to transformers.

    Raises:
        SourceError: weights that are damaged, incomplete, or another model's; a damaged generation_config.json.
    """
    if place is not None:
        check_objects(place, GENERATION)  # transformers goes on without one that is damaged
    try:
        model, info = kind.from_pretrained(place, output_loading_info=True, **arguments)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise SourceError(
            "the model cannot be loaded",
            found=f"{place}: {' '.join(str(error).split()):.300}",
            expected="a causal language model, or a reward model, that transformers loads",
        ) from error
    # A tensor without elements has nothing to load; sharded, it seems to transformers to have another shape.
    shapes = {name: own for name, shape, own in info["mismatched_keys"] if math.prod(shape) and math.prod(own)}
    missing = sorted({name for name in (*info["missing_keys"], *shapes) if not (fresh and is_score(name))})
    if missing:
        raise SourceError(
            "the checkpoint lacks tensors",
            found=f"{place} without {listed(missing)}",
            remedy="take the complete checkpoint",
        )
    text = model.config.get_text_config()
    if text.tie_word_embeddings and not model.all_tied_weights_keys:
        text.tie_word_embeddings = False
    return model  # type: ignore[no-any-return]


def load_tokenizer(source: DenseSource) -> PreTrainedTokenizerBase:
    """The dense model's tokenizer.

    Raises:
        SourceError: the source has none.
    """
    return load_tokenizer_from(source.path)


def load_tokenizer_from(place: Path | str) -> PreTrainedTokenizerBase:
    """The tokenizer in a directory or a GGUF file, or of a Hub id; code that comes with it is not run.

    Raises:
        MissingPackageError: it is a tokenizer.model, and what reads that is not installed.
        SourceError: there is none, or it or one of its files is damaged, or it needs its code.
    """
    from transformers import AutoTokenizer

    where, options = place, {}
    if isinstance(place, Path) and place.suffix == ".gguf":
        where, options = place.parent, {"gguf_file": place.name}
    else:
        check_objects(Path(place), TOKENIZER)
    try:
        return AutoTokenizer.from_pretrained(where, trust_remote_code=False, **options)
    except Exception as error:  # tokenizers raises bare ones about damaged files
        if Path(place, SENTENCEPIECE).exists():
            need(SENTENCEPIECE, "sentencepiece", "google.protobuf")
        raise SourceError(
            "there is no tokenizer that transformers can load",
            found=f"{place}: {' '.join(str(error).split()):.200}",
            remedy="add the tokenizer files to the model's directory",
        ) from error


def check_fits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sequence_length: int) -> None:
    """Check that the model has an embedding for every token, and a position for every token of a sequence.

    Raises:
        ConfigError: it has not.
    """
    text = model.config.get_text_config()
    if len(tokenizer) > text.vocab_size:
        raise ConfigError(
            "the tokenizer has more tokens than the model",
            found=f"tokenizer {len(tokenizer)}, model {text.vocab_size}",
            remedy="take the tokenizer that belongs to the model",
        )
    positions = getattr(text, "max_position_embeddings", None)
    if not 1 <= sequence_length <= (positions or sequence_length):
        expected = f"1 to {positions}, the positions that the model has"
        raise ConfigError("sequence_length is out of range", found=sequence_length, expected=expected)


def ffn_modules(model: nn.Module, path: str, layers: Iterable[int]) -> dict[int, nn.Module]:
    """The FFN (or MoE block) of each layer; `path` has `{layer}` left open."""
    return {layer: reduce(getattr, path.format(layer=layer).split("."), model) for layer in layers}


@contextmanager
def quietly() -> Iterator[None]:
    """Without transformers' progress bars, and without torch's word on qwen2_moe's shared expert of width 0."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Initializing zero-element tensors is a no-op")
            yield
    finally:
        if shown:
            logging.enable_progress_bar()
