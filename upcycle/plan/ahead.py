"""A new block for multi-token prediction: its layers are copies of the model's last ones of their kinds, or drawn.

What it computes is in `models.ahead`. A copy starts with the model's output as its input, and without the embedding.

Shapes: H hidden.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from upcycle.arch.families import FAMILIES
from upcycle.errors import ConfigError, TargetError, listed
from upcycle.plan.parts import Constant, Identity, Normal

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from upcycle.arch.family import DenseModel, Family, Shape
    from upcycle.plan.parts import Part
    from upcycle.plan.tensors import TargetTensor

MADE = ("copy", "random")


def ahead_family(model_type: str, option: str = "mtp.start") -> Family:
    """The family of a type, which has layers for multi-token prediction.

    Args:
        model_type: of transformers.
        option: that asks for them.

    Raises:
        ConfigError: it has none.
    """
    family = FAMILIES.get(model_type)
    if family is None or family.ahead is None:
        known = sorted(name for name, each in FAMILIES.items() if each.ahead)
        raise ConfigError(
            "this type has no layers for multi-token prediction",
            found=f"model_type={model_type}",
            expected=", ".join(known),
            remedy=f"set {option}=none",
        )
    return family


def block_kinds(family: Family, fields: Mapping[str, Any]) -> tuple[str, str]:
    """The kinds of the layers of a new block: attention, and experts, or an FFN in a dense model.

    Args:
        family: has such layers.
        fields: of config.json without them.
    """
    experts = any(family.kinds[kind].experts for kind in family.layer_kinds(fields, 0))
    attention = next(name for name, kind in family.kinds.items() if kind.mixer == "attention")
    ffn = next(name for name, kind in family.kinds.items() if (kind.experts if experts else kind.ffn))
    return attention, ffn


def block_tensors(
    model: DenseModel, own: Mapping[str, TargetTensor], start: str, *, tied: Mapping[str, int], option: str
) -> Iterator[TargetTensor]:
    """Yield the tensors of a new block.

    Args:
        model: the model, dense or MoE, as the config.json that tells of the block says.
        own: its other tensors by name.
        start: one of `MADE`.
        tied: tensors inside a layer of which so many neighbouring rows are drawn as one.
        option: that asks for the block.

    Raises:
        ConfigError: the model has no layer of a kind that the block has.
    """
    ahead, shapes = model.family.ahead, model.ahead_shapes()
    assert ahead
    norm = next(name for name, symbols in model.family.outer.items() if symbols == "H")
    kinds = ahead.pattern(model.config.to_dict())
    for place, kind in enumerate(kinds):
        if kind not in model.pattern:
            raise ConfigError(
                f"{option}={start} needs a layer of every kind that the block has",
                found=f"{kind} in {''.join(model.pattern)}",
                expected=f"a layer of each of {''.join(kinds)}",
                remedy=f"set {option}=none",
            )
        last = model.layers - 1 - model.pattern[::-1].index(kind)
        prefix, alike = ahead.layer.format(layer=place), model.family.layer.format(layer=last)
        for name, shape in shapes.items():
            inside = name.removeprefix(prefix)
            if inside == name:
                continue
            likeness = own[_likeness(own, norm, alike, inside, shape)]
            parts: tuple[Part, ...] = likeness.parts
            if inside in ahead.first:
                parts = (_entrance(name, shape, start, model.config.initializer_range),)
            elif start == "random":
                parts = (_drawn(name, shape, model.config.initializer_range, tied.get(inside, 1)),)
            yield replace(likeness, name=name, shape=shape, parts=parts, kind="ahead", layer=None)


def _likeness(own: Mapping[str, TargetTensor], norm: str, alike: str, inside: str, shape: Shape) -> str:
    """The tensor of the model whose dtype, and in a copy whose values, a tensor of the block has.

    What the layer that it is like does not have is like the model's last norm, or has a dtype of the layer's matrices.
    """
    if alike + inside in own:
        return alike + inside
    matrices = (name for name, tensor in own.items() if name.startswith(alike) and len(tensor.shape) == len(shape))
    return norm if len(shape) == 1 else next(matrices)


def _entrance(name: str, shape: Shape, start: str, std: float) -> Part:
    """What takes in an embedding and an output, [H, 2H] in this order, and the norms [H] before it."""
    if start == "copy" and len(shape) == 2:
        rows, cols = shape
        return Identity(rows=rows, cols=cols, behind=cols - rows)
    return _drawn(name, shape, std, 1)


def _drawn(name: str, shape: Shape, std: float, repeat: int) -> Part:
    """As transformers starts layers: weights of norms are 1, biases 0."""
    if len(shape) == 1:
        return Constant(numel=shape[0], value=0.0 if name.endswith("bias") else 1.0)
    rows, cols = shape
    return Normal(rows=rows, cols=cols, std=std, key=name, repeat=repeat)


def check_kept(source: DenseModel, written: DenseModel) -> None:
    """Check that config.json describes the layers for multi-token prediction that are kept.

    Args:
        source: the dense model, with its layers.
        written: the MoE, as its config.json says.

    Raises:
        TargetError: it does not: experts have one shape for the whole model.
    """
    kept, told = source.ahead_shapes(), written.ahead_shapes()
    if kept != told:
        differing = [name for name in {**kept, **told} if kept.get(name) != told.get(name)]
        raise TargetError(
            "the source's layers for multi-token prediction have experts that are not those of the mixture",
            found=listed(differing),
            expected="a block with an FFN, or with experts as config.json will describe them",
            remedy="set mtp=copy, random or none",
        )


def ahead_notes(model: DenseModel, start: str) -> Iterator[str]:
    """What a user should know of a new block."""
    ahead = model.family.ahead
    assert ahead
    kinds = "".join(ahead.pattern(model.config.to_dict()))
    made = {"copy": "copies of the last layers of these kinds, with the model's output as input", "random": "drawn"}
    yield f"mtp={start}: a block {kinds} for multi-token prediction, {made[start]}; the model's logits do not use it"
