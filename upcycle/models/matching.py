"""Which stored tensor is which tensor of a dense model."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from upcycle.arch.head import CAUSAL, NEMO_WEIGHT, REWARD
from upcycle.errors import SourceError, listed, near_misses

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from upcycle.arch.family import DenseModel, Shape

HEAD = CAUSAL.tensor
NAMES = {NEMO_WEIGHT: REWARD.tensor}  # what others call a tensor
WRAPPERS = {
    "module.": "save the model inside DistributedDataParallel or DeepSpeed: model.module.save_pretrained(DIR)",
    "_orig_mod.": "save the model inside torch.compile: model._orig_mod.save_pretrained(DIR)",
    "base_model.model.": "merge the adapter first: model.merge_and_unload().save_pretrained(DIR)",
}
_log = logging.getLogger("upcycle")


def match_names(
    model: DenseModel, shapes: Mapping[str, Shape | None], *, unlisted: Collection[str] = ()
) -> dict[str, str]:
    """The stored name of every tensor of a model, by the model's name; of a tied pair, whichever is stored.

    Args:
        model: the dense model, as its config says.
        shapes: of the stored tensors, by name; None where it is not known.
        unlisted: those that an index does not list: they need not be known.

    Raises:
        SourceError: a tensor is unknown, missing, or of another shape.
    """
    expected, family = model.tensors(), model.family
    if model.tied:
        expected = {**expected, HEAD: (model.sizes["V"], model.hidden_size)}
    stored, unknown = {}, []
    for name in shapes:
        own = NAMES.get(name, name)
        canonical = own if own in expected else family.base_prefix + own
        if canonical in expected:
            stored[canonical] = name
        elif not name.endswith(family.ignored):
            unknown.append(name)
    extra = [name for name in unknown if name in unlisted]
    if extra:
        _log.warning("not read, since no index lists them and the model has no place for them: %s", listed(extra))
    _check_ahead(model, stored, unknown)
    strangers = [name for name in unknown if name not in unlisted]
    if strangers:
        raise _wrapped(strangers, shapes, expected) or SourceError(
            f"the source has tensors that a {family.model_type} model does not have",
            found=listed(strangers),
            expected=near_misses(strangers[0], expected) if len(expected) < 5000 else "names of the architecture",
            remedy="check model_type in config.json; merge adapters and remove extra heads first",
        )
    if model.tied and family.embedding not in stored and HEAD in stored:
        stored[family.embedding] = stored.pop(HEAD)
    missing = [name for name in model.tensors() if name not in stored]
    if missing:
        raise SourceError(
            f"the source lacks tensors of a {family.model_type} model",
            found=f"{len(stored)} tensors",
            expected=listed(missing),
            remedy="download the complete checkpoint",
        )
    for name, file_name in stored.items():
        shape = shapes[file_name]
        if shape is not None and tuple(shape) != expected[name]:
            raise SourceError(
                f"{file_name} does not have the shape that config.json says",
                found=tuple(shape),
                expected=expected[name],
                remedy="take config.json and weights from the same model",
            )
    return stored


def _check_ahead(model: DenseModel, stored: Collection[str], unknown: Collection[str]) -> None:
    """Check that config.json and files agree about layers for multi-token prediction."""
    ahead = model.family.ahead
    if ahead is None:
        return
    untold = [name for name in unknown if name.startswith(ahead.prefix)]
    if untold:
        raise SourceError(
            "the files have layers for multi-token prediction that config.json does not tell of",
            found=f"{listed(untold)}, and {ahead.depths}={getattr(model.config, ahead.depths, 0)}",
            expected=f"as many as {ahead.depths} says",
            remedy=f"set {ahead.depths} in config.json to what the model was trained with, or delete these tensors",
        )
    missing = [name for name in model.ahead_shapes() if name not in stored]
    if missing:
        raise SourceError(
            "config.json tells of layers for multi-token prediction that the files do not have, or not whole",
            found=f"{ahead.depths}={getattr(model.config, ahead.depths)} without {listed(missing)}",
            expected="all of their tensors",
            remedy=f"download the complete checkpoint; or set {ahead.depths} to 0, as transformers does not when it "
            "saves a model without them",
        )


def _wrapped(
    strangers: list[str], shapes: Mapping[str, Shape | None], expected: Mapping[str, Shape]
) -> Exception | None:
    """The error for a model that was saved inside a wrapper, whose name then stands before every tensor's."""
    prefixes = {name.removesuffix(known) for name in strangers[:1] for known in expected if name.endswith("." + known)}
    prefix = max(prefixes, key=len, default="")
    if not prefix or not all(name.startswith(prefix) for name in shapes):
        return None
    remedies = [remedy for wrapper, remedy in WRAPPERS.items() if wrapper in prefix]
    return SourceError(
        f"every tensor's name begins with {prefix!r}: the model was saved inside a wrapper",
        found=strangers[0],
        expected=strangers[0].removeprefix(prefix),
        remedy=remedies[0] if remedies else "save the model inside the wrapper with its own save_pretrained(DIR)",
    )
