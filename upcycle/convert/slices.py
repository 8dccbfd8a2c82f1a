"""Target tensors of which only what is asked for is made, from slices of the source.

So each rank reads what its shard needs, nothing is written, and no rank holds the whole model ("online upcycling",
arXiv 2412.09952).
"""

from __future__ import annotations

import math
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from upcycle.convert.materialise import Materialiser, check_finite
from upcycle.plan.parts import narrow, numel, width

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from upcycle.arch.family import Shape
    from upcycle.plan.parts import Part, Range, Take
    from upcycle.plan.tensors import TargetTensor


class SliceMaterialiser(Materialiser):
    """Makes slices of target tensors in float32, on any number of threads.

    Args:
        read: returns a source tensor by name, memory-mapped.
        seed: seed of everything random.
        shapes: of the source's tensors.
        bases: as for `Materialiser`.

    Attributes:
        bytes_read: of the source's values so far, as they are stored; what two tensors need counts twice.
    """

    def __init__(
        self,
        read: Callable[[str], Tensor],
        seed: int,
        shapes: Mapping[str, Shape],
        bases: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(read, seed, bases)
        self.bytes_read = 0
        self._shapes = shapes
        self._counting = Lock()

    def slice(self, target: TargetTensor, ranges: tuple[Range, ...]) -> Tensor:
        """Part of a tensor.

        Args:
            target: the tensor.
            ranges: a half-open range of each dimension.

        Raises:
            SourceError: NaN or infinity in what was read.
        """
        (start, stop), rest = ranges[0], ranges[1:]
        kept = [stop - start for start, stop in ranges]
        if not math.prod(kept):
            return torch.empty(kept)
        if len(target.parts) == 1 and len(ranges) == 2 and rest[0] != (0, target.shape[1]):
            narrowed = narrow(target.parts[0], ranges[0], rest[0])
            if narrowed:
                return self._made(narrowed).reshape(kept)
        rows = torch.cat(list(self._rows(target, start, stop))).reshape(stop - start, *target.shape[1:])
        return rows[(slice(None), *(slice(*each) for each in rest))]

    def _rows(self, target: TargetTensor, start: int, stop: int) -> Iterator[Tensor]:
        """What the parts have of the rows from `start` to `stop`, in order."""
        stride = math.prod(target.shape[1:])
        first, last, offset = start * stride, stop * stride, 0
        for part in target.parts:
            size = numel(part, self._shapes)
            begin, end = max(first - offset, 0), min(last - offset, size)
            if begin < end:
                yield self._between(part, begin, end)
            offset += size

    def _between(self, part: Part, begin: int, end: int) -> Tensor:
        """The values of a part from `begin` to `end`, made whole only where it has to be."""
        row = width(part, self._shapes)
        narrowed = None if begin % row or end % row else narrow(part, (begin // row, end // row))
        return self._made(narrowed) if narrowed else self._made(part)[begin:end]

    def _made(self, part: Part) -> Tensor:
        return torch.cat([block.flatten() for block in self._blocks(part, torch.float32)])

    def _source(self, name: str) -> Tensor:
        return self._read(name)

    def _rectangle(self, take: Take) -> Tensor:
        rectangle = super()._rectangle(take)
        check_finite(rectangle, take.source)
        with self._counting:
            self.bytes_read += rectangle.numel() * rectangle.element_size()
        return rectangle


class SlicedTensor:
    """A target tensor in the place of one of a safetensors file: transformers' loader asks for slices of it.

    Args:
        target: the tensor.
        materialiser: makes the slices.
    """

    def __init__(self, target: TargetTensor, materialiser: SliceMaterialiser) -> None:
        self._target, self._materialiser = target, materialiser

    def get_shape(self) -> list[int]:
        return list(self._target.shape)

    def __getitem__(self, index: Any) -> Tensor:
        """The values, in float32, at `...` (all of them) or at a tuple of slices without steps."""
        slices = (slice(None),) * len(self._target.shape) if index is ... else index
        ranges = (each.indices(size)[:2] for each, size in zip(slices, self._target.shape, strict=True))
        return self._materialiser.slice(self._target, tuple(ranges))
