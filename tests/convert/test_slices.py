"""Slices of target tensors are those of the whole tensors, bit for bit, and only what they need is read."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest
import torch
from conversions import edit, options
from models import ONE_PER_FAMILY, build, save

from upcycle.convert.materialise import Materialiser
from upcycle.convert.prepare import prepare
from upcycle.convert.slices import SlicedTensor, SliceMaterialiser
from upcycle.errors import SourceError
from upcycle.plan import parts

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from upcycle.convert.prepare import Conversion

INITS = ("virtual_group", "copy", "drop", "noise", "random")


def conversion(name: str, tmp_path: Path, **changes: Any) -> Conversion:
    source = save(build(name), tmp_path / name, max_shard_size="5KB", dtype=torch.bfloat16)
    return prepare(options(source, tmp_path / "moe", **changes), execute=True)


def slicing(conversion: Conversion) -> SliceMaterialiser:
    return SliceMaterialiser(conversion.source.read, 0, conversion.source.model.tensors())


def some_slices(shape: tuple[int, ...], rng: random.Random) -> list[tuple[slice, ...]]:
    """All of a tensor, none of it, and halves and odd ranges along one dimension and along all."""
    made = [tuple(slice(None) for _ in shape), (slice(0, 0), *(slice(None) for _ in shape[1:]))]
    for dim, size in enumerate(shape):
        for part in (slice(0, size // 2), slice(size // 2, size), slice(size // 3, size // 3 + 1)):
            made.append(tuple(part if each == dim else slice(None) for each in range(len(shape))))
    for _ in range(3):
        made.append(tuple(slice(*sorted(rng.choices(range(size + 1), k=2))) for size in shape))
    return made


def differing(conversion: Conversion) -> list[str]:
    """Names of the target tensors of which some slice is not that of the whole."""
    whole, sliced, rng = Materialiser(conversion.source.read, 0), slicing(conversion), random.Random(0)
    found = []
    for target in conversion.plan.tensors:
        expected: Tensor = whole.tensor(target, torch.float32)
        lazy = SlicedTensor(target, sliced)
        assert lazy.get_shape() == list(expected.shape)
        same = torch.equal(lazy[...], expected)
        for index in some_slices(tuple(expected.shape), rng):
            got = lazy[index]
            same = same and got.dtype == expected.dtype and torch.equal(got, expected[index])
        found += [] if same else [target.name]
    return found


@pytest.mark.parametrize("target", ["auto", "upcycled_moe"])
@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_slices_are_those_of_the_whole(name: str, target: str, tmp_path: Path) -> None:
    assert differing(conversion(name, tmp_path, target=target)) == []


@pytest.mark.parametrize("init", INITS)
def test_every_init(init: str, tmp_path: Path) -> None:
    changes = {"granularity": 1, "top_k": 1} if init == "copy" else {}
    assert differing(conversion("gpt2", tmp_path, init=init, **changes)) == []
    assert differing(conversion("llama", tmp_path, init=init, shared_experts=1, **changes)) == []


def test_a_slice_from_elsewhere_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "_inside", lambda outer, inner: (outer[0], outer[0] + inner[1] - inner[0]))
    assert differing(conversion("llama", tmp_path))


def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    """Half of the rows, or of the columns, of every matrix takes half of its bytes, and a router none."""
    planned = conversion("llama", tmp_path)
    for target in planned.plan.tensors:
        for dim, size in enumerate(target.shape):
            sliced = slicing(planned)
            got = SlicedTensor(target, sliced)[
                tuple(slice(0, size // 2) if each == dim else slice(None) for each in range(len(target.shape)))
            ]
            stored = 0 if target.kind in ("router", "shared_gate", "zeros") else 2 * got.numel()  # bfloat16
            assert sliced.bytes_read == stored, target.name


def test_an_expert_of_a_stacked_type_reads_its_shard_alone(tmp_path: Path) -> None:
    planned = conversion("llama", tmp_path, target="upcycled_moe")
    target = next(each for each in planned.plan.tensors if each.name.endswith("experts.gate_up_proj"))
    sliced = slicing(planned)
    got = SlicedTensor(target, sliced)[3:4, :, :]
    assert sliced.bytes_read == 2 * got.numel()


def test_nan_is_refused_where_it_is_read(tmp_path: Path) -> None:
    source = save(build("llama"), tmp_path / "llama")
    name = "model.layers.1.mlp.up_proj.weight"
    edit(source, lambda tensors: tensors[name].__setitem__((20, 0), float("nan")))
    planned = prepare(options(source, tmp_path / "moe", target="upcycled_moe"), execute=True)
    tensors = planned.target_tensors()
    target = next(t for key, t in tensors.items() if "layers.1" in key and key.endswith("experts.gate_up_proj"))
    lazy = SlicedTensor(target, slicing(planned))
    assert lazy[0:1, :, :].isfinite().all()  # rows 0 to 12
    with pytest.raises(SourceError, match=f"NaN or infinity in {name}"):
        lazy[1:2, :, :]
