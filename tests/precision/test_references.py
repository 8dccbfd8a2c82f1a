"""The emulator against TransformerEngine's reference quantizers, bit for bit, and torchao's; `make test` has both."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from upcycle.precision.formats import E4M3, E5M2
from upcycle.precision.quantise import LARGEST, NVFP4, NVFP4_SQUARES, Scaling, quantise
from upcycle.precision.recipes import RECIPES
from upcycle.precision.rotation import SIGNS, rotate

if TYPE_CHECKING:
    from upcycle.precision.quantise import Quantised

PACKAGES = os.environ.get("PRECISION_PACKAGES", "")
pytestmark = pytest.mark.skipif(not PACKAGES, reason="PRECISION_PACKAGES names no directory with transformer-engine")
SHAPES = [(64, 128), (48, 32), (160, 256)]
CASES = [
    f"{kind} {rows}x{columns} {dtype}"
    for kind in ("normal", "heavy-tailed", "partly zero", "zero")
    for rows, columns in SHAPES
    for dtype in ("float32", "bfloat16")
]
CLOSE = 1e-6  # relative


def matrix(case: str) -> torch.Tensor:
    kind, shape, dtype = case.rsplit(" ", 2)
    values = torch.Generator().manual_seed(CASES.index(case))
    x = torch.randn(*map(int, shape.split("x")), generator=values)
    if kind == "heavy-tailed":
        x *= torch.exp(3 * torch.randn(x.shape, generator=values))
    if kind.endswith("zero"):
        x[:16] = x[:, :16] = 0
    return (x * (kind != "zero")).to(getattr(torch, dtype))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """What the packages make of all cases."""
    root = tmp_path_factory.mktemp("references")
    torch.save({case: matrix(case) for case in CASES}, root / "input.pt")
    script = str(Path(__file__).with_name("in_references.py"))
    environment = os.environ | {"PYTHONPATH": PACKAGES}
    line = [sys.executable, script, str(root / "input.pt"), str(root / "output.pt")]
    ended = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    read: dict[str, torch.Tensor] = torch.load(root / "output.pt")
    return read


def assert_same_nvfp4(ours: Quantised, written: dict[str, torch.Tensor], name: str) -> None:
    """Equal numbers, and equal scales: E4M3 for each block, float32 for the matrix."""
    outer = torch.div(torch.tensor(448.0 * 6), written[f"{name}/amax"]).clamp_max(LARGEST)
    assert torch.equal(ours.numbers_RC, written[f"{name}/numbers"])
    assert torch.equal(ours.scale_RC[:, ::16], written[f"{name}/scale"] * outer.reciprocal())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("name", "scaling"), [("nvfp4", NVFP4), ("squares", NVFP4_SQUARES)])
def test_nvfp4(written: dict[str, torch.Tensor], case: str, name: str, scaling: Scaling) -> None:
    x = matrix(case)
    assert_same_nvfp4(quantise(x, scaling), written, f"{case}/{name}/rows")
    assert_same_nvfp4(quantise(x.T.contiguous(), scaling), written, f"{case}/{name}/columns")


@pytest.mark.parametrize("case", CASES)
def test_nvfp4_rotated(written: dict[str, torch.Tensor], case: str) -> None:
    assert_same_nvfp4(quantise(rotate(matrix(case).T.contiguous()), NVFP4), written, f"{case}/rotated/columns")


def test_signs_of_the_rotation_are_compared(written: dict[str, torch.Tensor]) -> None:
    """The mutant: a rotation without them."""
    x = matrix(CASES[0]).T.contiguous()
    signs = torch.tensor(SIGNS, dtype=torch.float32).repeat(x.shape[1] // len(SIGNS))
    with pytest.raises(AssertionError):
        assert_same_nvfp4(quantise(rotate(x * signs), NVFP4), written, f"{CASES[0]}/rotated/columns")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("format", [E4M3, E5M2], ids=lambda each: each.name)
@pytest.mark.parametrize("powers", [False, True])
def test_current_scaling(written: dict[str, torch.Tensor], case: str, format: object, powers: bool) -> None:
    ours = quantise(matrix(case), Scaling(format=format, scale="power_of_two" if powers else "float32"))  # type: ignore[arg-type]
    name = f"{case}/{format.name}/{powers}"  # type: ignore[attr-defined]
    assert torch.equal(ours.numbers_RC, written[f"{name}/numbers"])
    assert torch.equal(ours.scale_RC[0, :1], written[f"{name}/scale"])


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("zero")])
@pytest.mark.parametrize("name", ["nvfp4", "mxfp8"])
def test_torchao(written: dict[str, torch.Tensor], case: str, name: str) -> None:
    """It divides by the factor of an NVFP4 matrix where TransformerEngine multiplies: a few ties fall otherwise.

    Heavy tails leave the scales of small blocks on few numbers of E4M3, and the elements of a block go with its scale.
    """
    ours, theirs = quantise(matrix(case), RECIPES[name].activation).values_RC(), written[f"{case}/torchao/{name}"]
    differing = ((ours - theirs).abs() > CLOSE * theirs.abs()).double().mean()
    allowed = 0.02 if case.startswith("heavy") else 0.005
    assert differing <= (allowed if name == "nvfp4" else 0)
