"""Turns a part of the plan into values: reads the source, applies `init`, scales, casts."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from upcycle.errors import SourceError
from upcycle.init.experts import add_noise, drop_neurons, normal, row_blocks
from upcycle.init.rng import generator
from upcycle.plan.parts import (
    AddNoise,
    Basis,
    Beside,
    Constant,
    DropNeurons,
    Identity,
    Normal,
    Part,
    Pick,
    Projected,
    Shard,
    Take,
    Whole,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from upcycle.plan.tensors import TargetTensor

SOURCES_AT_ONCE = 2


class Materialiser:
    """Makes the values of target tensors, one part at a time.

    Args:
        read: returns a source tensor by name, memory-mapped where the format allows it.
        seed: seed of everything random.
        bases: computed matrices by name; None where no part needs one.
    """

    def __init__(self, read: Callable[[str], Tensor], seed: int, bases: Mapping[str, Tensor] | None = None) -> None:
        self._read = read
        self._seed = seed
        self._bases = bases or {}
        self._open: OrderedDict[str, Tensor] = OrderedDict()

    def tensor(self, target: TargetTensor, dtype: torch.dtype) -> Tensor:
        """The whole tensor, in `dtype`.

        Raises:
            SourceError: as `blocks`.
        """
        pieces = [block.flatten() for block in self.blocks(target, dtype)]
        return torch.cat([torch.empty(0, dtype=dtype), *pieces]).reshape(target.shape)

    def blocks(self, target: TargetTensor, dtype: torch.dtype) -> Iterator[Tensor]:
        """Yield the tensor's values in order, contiguous, in `dtype`, a few rows at a time.

        Raises:
            SourceError: NaN or infinity in an FFN weight, or a value that `dtype` cannot hold.
        """
        for part in target.parts:
            for block in self._blocks(part, dtype):
                if dtype == torch.float16:
                    check_finite(block, f"{target.name} in float16", remedy="set dtype=bfloat16 or dtype=float32")
                yield block.contiguous()

    def _blocks(self, part: Part, dtype: torch.dtype) -> Iterator[Tensor]:
        match part:
            case Whole():
                yield from (block.to(dtype) for block in row_blocks(self._read(part.source)))
            case Take() | Pick() | Projected():
                yield from (_scaled(block, part.factor, dtype) for block in row_blocks(self._shard(part)))
            case Beside():
                rows = zip(*(self._blocks(each, dtype) for each in part.parts), strict=True)
                yield from (torch.cat(blocks, dim=1) for blocks in rows)
            case DropNeurons():
                made = drop_neurons(
                    self._shard(part.base),
                    neuron_axis=part.neuron_axis,
                    ratio=part.ratio,
                    neurons=generator(self._seed, part.neurons_key),
                    values=generator(self._seed, part.values_key),
                )
                yield from (_scaled(block, part.base.factor, dtype) for block in made)
            case AddNoise():
                values = generator(self._seed, part.key)
                made = add_noise(self._shard(part.base), std=part.std, fraction=part.fraction, values=values)
                yield from (_scaled(block, part.base.factor, dtype) for block in made)
            case Normal():
                values = generator(self._seed, part.key)
                made = normal(part.rows, part.cols, std=part.std, repeat=part.repeat, values=values)
                yield from (_scaled(block, part.factor, dtype) for block in made)
            case Constant():
                yield torch.full((part.numel,), part.value, dtype=dtype)
            case Basis():
                yield from (block.to(dtype) for block in row_blocks(self._bases[part.name]))
            case Identity():
                ones = torch.eye(part.rows, part.cols - part.behind, dtype=dtype) * part.factor
                yield F.pad(ones, (part.behind, 0))

    def _shard(self, part: Shard) -> Tensor:
        """The values before their factor; a projection is computed in float64."""
        match part:
            case Take():
                return self._rectangle(part)
            case Pick():
                return self._rectangle(part.base).index_select(part.neuron_axis, torch.tensor(part.neurons))
            case Projected():
                base, basis_HL = self._shard(part.base).double(), self._bases[part.basis].double()
                return (base @ basis_HL if part.side == "input" else basis_HL.T @ base).float()

    def _rectangle(self, take: Take) -> Tensor:
        source = self._source(take.source)
        oriented = source.T if take.transposed and source.dim() == 2 else source
        rows = oriented[slice(*take.rows)]
        return rows[:, slice(*take.cols)] if take.cols else rows

    def _source(self, name: str) -> Tensor:
        if name not in self._open:
            tensor = self._read(name)
            check_finite(tensor, name)
            self._open[name] = tensor
            while len(self._open) > SOURCES_AT_ONCE:
                self._open.popitem(last=False)
        return self._open[name]


def _scaled(values: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    if factor == 1.0:
        return values.to(dtype)
    return (values.to(torch.promote_types(values.dtype, dtype)) * factor).to(dtype)


def check_finite(values: Tensor, name: str, *, remedy: str = "repair the checkpoint") -> None:
    """Raise SourceError if some of the values are NaN or infinite: one would spread to every expert."""
    if values.numel() and not torch.stack(values.aminmax()).isfinite().all():
        bad = int((~values.isfinite()).sum())
        raise SourceError(f"NaN or infinity in {name}", found=f"{bad} of {values.numel()} values", remedy=remedy)
