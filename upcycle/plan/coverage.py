"""Checks that a plan forgets nothing and makes nothing twice."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

from upcycle.plan.parts import Part, Pick, Range, Take, Whole, numel, taken

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from upcycle.arch.family import Shape
    from upcycle.plan.tensors import TargetTensor


def check_coverage(tensors: Sequence[TargetTensor], source: Mapping[str, Shape], *, dropped: Collection[str]) -> None:
    """Every source element is taken over or its tensor explicitly dropped; every target element is produced once.

    A projection takes over what it projects; that something is lost in it, the plan's losses say.

    Args:
        tensors: those to write.
        source: the dense model's, with their shapes.
        dropped: names of those that are not taken over.

    Raises:
        AssertionError: naming the tensors; the plan is wrong, not the user.
    """
    twice = [name for name, count in Counter(tensor.name for tensor in tensors).items() if count > 1]
    assert not twice, f"planned twice: {twice}"
    for tensor in tensors:
        made, needed = sum(numel(part, source) for part in tensor.parts), math.prod(tensor.shape)
        assert made == needed, f"{tensor.name} {tensor.shape}: {made} of {needed} elements produced"
    parts = [part for tensor in tensors if tensor.kind != "copy" for part in tensor.parts]
    covered = {part.source for part in parts if isinstance(part, Whole)} | set(dropped)
    takes = _takes(parts)
    shared = _takes(part for tensor in tensors if tensor.kind == "shared" for part in tensor.parts)
    routed = _takes(part for tensor in tensors if tensor.kind == "expert" for part in tensor.parts)
    picks = _picks(parts)
    for name, shape in source.items():
        both = _tile(shared[name], shape) and (not routed[name] or _tile(routed[name], shape))
        cut = (_tile(takes[name], shape) or both) and name not in picks
        exact = name in covered or cut or (not takes[name] and _listed(picks.get(name), shape))
        assert exact, f"{name} {shape}: not taken over exactly"


def _takes(parts: Iterable[Part]) -> dict[str, set[Take]]:
    """The different rectangles of each source tensor that parts are made from."""
    takes: dict[str, set[Take]] = defaultdict(set)
    for take in (take for part in parts for take in taken(part) if isinstance(take, Take)):
        takes[take.source].add(replace(take, factor=1.0))
    return takes


def _picks(parts: Iterable[Part]) -> dict[str, set[Pick]]:
    """The different lists of neurons of each source tensor that parts are made from."""
    picks: dict[str, set[Pick]] = defaultdict(set)
    for pick in (pick for part in parts for pick in taken(part) if isinstance(pick, Pick)):
        picks[pick.base.source].add(replace(pick, base=replace(pick.base, factor=1.0)))
    return dict(picks)


def _listed(picks: Collection[Pick] | None, shape: Shape) -> bool:
    """Whether lists of neurons name every row, or every column, of a tensor exactly once."""
    if not picks or not all(_inside(pick.base, shape) for pick in picks):
        return False
    across = {_ranges(pick.base)[1 - pick.neuron_axis] if pick.base.cols else None for pick in picks}
    elements = sum(numel(pick, {}) for pick in picks)
    starts = ((_ranges(pick.base)[pick.neuron_axis][0], pick.neurons) for pick in picks)
    named = sorted(start + neuron for start, neurons in starts for neuron in neurons)
    return len(across) == 1 and elements == math.prod(shape) and named == list(range(len(named)))


def _tile(takes: Iterable[Take], shape: Shape) -> bool:
    """Whether rectangles, cut along one axis, cover a tensor exactly once."""
    ordered = sorted(takes, key=lambda take: (take.rows, take.cols or ()))
    inside = all(_inside(take, shape) for take in ordered)
    disjoint = not any(_overlap(one, other) for one, other in pairwise(ordered))
    return inside and disjoint and sum(numel(take, {}) for take in ordered) == math.prod(shape)


def _inside(take: Take, shape: Shape) -> bool:
    sizes = reversed(shape) if take.transposed else shape
    return all(end <= size for (_, end), size in zip(_ranges(take), sizes, strict=True))


def _overlap(one: Take, other: Take) -> bool:
    return all(a[0] < b[1] and b[0] < a[1] for a, b in zip(_ranges(one), _ranges(other), strict=True))


def _ranges(take: Take) -> tuple[Range, ...]:
    return (take.rows, take.cols) if take.cols else (take.rows,)
