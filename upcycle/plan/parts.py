"""The few transforms that every target tensor is made of. A part describes a tensor; `init` makes it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

    from upcycle.arch.family import Shape

Range = tuple[int, int]
Neurons = Literal["coherent", "independent"]
Side = Literal["input", "output"]


@dataclass(frozen=True, kw_only=True)
class Take:
    """A rectangle of a source tensor, read as [out, in] (a vector as [out]), times a factor.

    Attributes:
        source: name of the source tensor.
        rows, cols: half-open ranges in [out, in]; `cols` is None for a vector or a whole tensor of another rank.
        transposed: the source is stored [in, out].
        factor: what the values are multiplied by.
    """

    source: str
    rows: Range
    cols: Range | None = None
    transposed: bool = False
    factor: float = 1.0

    def __str__(self) -> str:
        ranges = ", ".join(f"{start}:{stop}" for start, stop in filter(None, (self.rows, self.cols)))
        return f"{self.source}[{ranges}]{'.T' if self.transposed else ''}{_times(self.factor)}"


@dataclass(frozen=True, kw_only=True)
class Pick:
    """Listed neurons of a `Take`, in that order.

    Attributes:
        base: all neurons of a matrix, or of a bias; `base.factor` scales those that are listed.
        neuron_axis: 0 where neurons are rows (gate, up, a bias), 1 where they are columns (down).
        neurons: their indices in `base`.
    """

    base: Take
    neuron_axis: int
    neurons: tuple[int, ...]

    @property
    def factor(self) -> float:
        return self.base.factor

    def __str__(self) -> str:
        shown = ", ".join(map(str, self.neurons[:3])) + (", …" if len(self.neurons) > 3 else "")
        return f"{len(self.neurons)} neurons of {self.base} ({shown})"


@dataclass(frozen=True, kw_only=True)
class Projected:
    """A matrix of an expert in latent dimensions: what it reads, or what it writes, is projected.

    Attributes:
        base: the matrix [out, H] (`input`), [H, in], or a bias [H] (`output`); `base.factor` scales it.
        basis: names a computed matrix [H, L]; the product is base @ basis (`input`) or basis.T @ base (`output`).
        side: of the expert.
        latent: L.
    """

    base: Take | Pick
    basis: str
    side: Side
    latent: int

    @property
    def factor(self) -> float:
        return self.base.factor

    def __str__(self) -> str:
        return f"{self.base} projected to {self.latent} {self.side}s by [{self.basis}]"


@dataclass(frozen=True, kw_only=True)
class Basis:
    """A computed matrix [rows, cols] as it is."""

    name: str
    rows: int
    cols: int

    def __str__(self) -> str:
        return f"[{self.name}]"


@dataclass(frozen=True, kw_only=True)
class Identity:
    """The first rows and columns of an identity, times a factor.

    Attributes:
        rows, cols: shape.
        factor: what the values are multiplied by.
        behind: columns of zeros before it, among `cols`.
    """

    rows: int
    cols: int
    factor: float = 1.0
    behind: int = 0

    def __str__(self) -> str:
        zeros = f" behind {self.behind} columns of zeros" if self.behind else ""
        return f"identity [{self.rows}, {self.cols}]{zeros}{_times(self.factor)}"


@dataclass(frozen=True, kw_only=True)
class Whole:
    """A source tensor, bit for bit."""

    source: str

    def __str__(self) -> str:
        return self.source


@dataclass(frozen=True, kw_only=True)
class DropNeurons:
    """A shard in which a share of the neurons is drawn anew (Drop-Upcycling, arXiv 2502.19261).

    Attributes:
        base: the shard; `base.factor` scales old and new values alike.
        neuron_axis: 0 where neurons are rows (gate, up), 1 where they are columns (down).
        ratio: share of neurons drawn from N(mean, std) of the values that they replace.
        neurons_key: names the set of neurons; shared by gate, up and down when coherent.
        values_key: names the new values.
    """

    base: Shard
    neuron_axis: int
    ratio: float
    neurons_key: str
    values_key: str

    def __str__(self) -> str:
        return f"{self.base} with {self.ratio:g} of the neurons of [{self.neurons_key}] drawn anew"


@dataclass(frozen=True, kw_only=True)
class AddNoise:
    """A shard plus Gaussian noise on a share of its values.

    Attributes:
        base: the shard; `base.factor` scales values and noise alike.
        std: standard deviation in units of the shard's own.
        fraction: share of the values that get noise.
        key: names the random stream.
    """

    base: Shard
    std: float
    fraction: float
    key: str

    def __str__(self) -> str:
        return f"{self.base} + N(0, {self.std:g} std) on {self.fraction:g} of its values"


@dataclass(frozen=True, kw_only=True)
class Normal:
    """Values from N(0, std), times a factor.

    Attributes:
        rows, cols: shape.
        repeat: every drawn row stands `repeat` times in a row (virtual groups); `rows` counts all of them.
        std: standard deviation.
        factor: what the values are multiplied by.
        key: names the random stream.
    """

    rows: int
    cols: int
    std: float
    key: str
    repeat: int = 1
    factor: float = 1.0

    def __str__(self) -> str:
        repeated = f", each row {self.repeat} times" if self.repeat > 1 else ""
        return f"N(0, {self.std:g}) [{self.rows}, {self.cols}]{repeated}{_times(self.factor)}"


@dataclass(frozen=True, kw_only=True)
class Constant:
    """One value everywhere."""

    numel: int
    value: float = 0.0

    def __str__(self) -> str:
        return f"all {self.value:g}" if self.value else "zeros"


@dataclass(frozen=True, kw_only=True)
class Beside:
    """Matrices of equal height side by side."""

    parts: tuple[Take, ...]

    def __str__(self) -> str:
        return " beside ".join(str(part) for part in self.parts)


Shard = Take | Pick | Projected
Part = Shard | Whole | DropNeurons | AddNoise | Normal | Constant | Beside | Basis | Identity


def taken(part: Part) -> tuple[Take | Pick, ...]:
    """What a part is made from: rectangles of the source, and listed neurons of some."""
    match part:
        case Take() | Pick():
            return (part,)
        case DropNeurons(base=base) | AddNoise(base=base) | Projected(base=base):
            return taken(base)
        case Beside(parts=parts):
            return parts
    return ()


def numel(part: Part, source: Mapping[str, Shape]) -> int:
    """Elements of a part, given the shapes of the source's tensors."""
    match part:
        case Whole():
            return math.prod(source[part.source])
        case Take():
            return math.prod(stop - start for start, stop in filter(None, (part.rows, part.cols)))
        case DropNeurons() | AddNoise():
            return numel(part.base, source)
        case Pick():
            return numel(part.base, source) * len(part.neurons) // _neurons(part)
        case Projected():
            return numel(part.base, source) * part.latent // _projected(part)
        case Normal() | Basis() | Identity():
            return part.rows * part.cols
        case Constant():
            return part.numel
        case Beside():
            return sum(numel(each, source) for each in part.parts)


def width(part: Part, source: Mapping[str, Shape]) -> int:
    """Elements of a row of a part, given the shapes of the source's tensors; 1 for a vector."""
    match part:
        case Whole():
            return math.prod(source[part.source][1:])
        case Take():
            return part.cols[1] - part.cols[0] if part.cols else 1
        case DropNeurons() | AddNoise():
            return width(part.base, source)
        case Pick():
            return len(part.neurons) if part.neuron_axis else width(part.base, source)
        case Projected():
            return part.latent if part.side == "input" else width(part.base, source)
        case Normal() | Basis() | Identity():
            return part.cols
        case Constant():
            return 1
        case Beside():
            return sum(width(each, source) for each in part.parts)


def narrow(part: Part, rows: Range, cols: Range | None = None) -> Part | None:
    """The part that makes some rows of `part` alone, and of a matrix some columns; None if it can only be made whole.

    Args:
        part: any part.
        rows: half-open range within the part's own rows; of an entry of a vector too.
        cols: half-open range within the columns; None keeps all.
    """
    match part:
        case Whole():
            return Take(source=part.source, rows=rows, cols=cols)
        case Take() if part.cols or not cols:
            within = _inside(part.cols, cols) if part.cols and cols else part.cols
            return replace(part, rows=_inside(part.rows, rows), cols=within)
        case Beside() if cols is None:
            narrowed = (narrow(each, rows) for each in part.parts)
            return Beside(parts=tuple(each for each in narrowed if isinstance(each, Take)))
    return None


def _neurons(part: Pick) -> int:
    """All neurons that a part lists some of."""
    start, stop = part.base.cols if part.neuron_axis and part.base.cols else part.base.rows
    return stop - start


def _projected(part: Projected) -> int:
    """Rows of the basis that a part needs: entries of a row of its base, or of a column."""
    take = part.base if isinstance(part.base, Take) else part.base.base
    start, stop = take.cols if part.side == "input" and take.cols else take.rows
    return stop - start


def _inside(outer: Range, inner: Range) -> Range:
    return outer[0] + inner[0], outer[0] + inner[1]


def _times(factor: float) -> str:
    return "" if factor == 1.0 else f" * {factor:.9g}"
