"""MegaBlocks against the reference, where Triton runs: on a GPU, or in its interpreter. Run by test_megablocks.py."""

from __future__ import annotations

import pytest
import torch
from expert_cases import TOLERANCE, assert_matches_reference, assert_same, inputs, make_experts, results
from kernel_models import MODELS, build, gradients

from upcycle.errors import ConfigError
from upcycle.kernels import blocks
from upcycle.kernels.blocks import BLOCK, padded_blocks, topology
from upcycle.kernels.loop import loop
from upcycle.kernels.megablocks import megablocks
from upcycle.kernels.reference import reference
from upcycle.kernels.select import install_kernel
from upcycle.kernels.triton_ops import triton_ops

NATIVE = torch.cuda.is_available()
DEVICE = "cuda" if NATIVE else "cpu"
FLOAT32 = 2e-3 if NATIVE else TOLERANCE[torch.float32]  # stk's products have 10 bits (TF32) on a GPU
SHAPES = {
    "gated": {"hidden": 128, "width": 128},
    "gated_padded": {"hidden": 64, "width": 48},
    "gated_wide": {"hidden": 64, "width": 200, "activation": "gelu_pytorch_tanh"},
    "ungated": {"hidden": 128, "width": 128, "gated": False, "activation": "relu2"},
    "ungated_padded": {"hidden": 64, "width": 48, "gated": False, "activation": "gelu_new"},
    "biases": {"hidden": 64, "width": 48, "bias": True},
    "ungated_biases": {"hidden": 64, "width": 48, "gated": False, "bias": True},
}


def few_tokens(routing: str, hidden: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Inputs, of which the interpreter takes each row on its own."""
    return tuple(t[:12] for t in inputs(routing, hidden, dtype, DEVICE))


@pytest.fixture(scope="module", autouse=True)
def _one_configuration() -> None:
    if not NATIVE:
        for kernel in vars(triton_ops().copies).values():
            if hasattr(kernel, "configs"):  # choosing between several would time them on a GPU
                kernel.configs = kernel.configs[:1]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_matches_the_reference(shape):
    experts = make_experts(dtype=torch.float32, device=DEVICE, **SHAPES[shape])
    arguments = few_tokens("top_3", SHAPES[shape]["hidden"])
    assert_matches_reference(megablocks, experts, arguments, FLOAT32)


@pytest.mark.parametrize("routing", ["top_1", "one_token", "no_tokens", "dropped_pairs", "repeated_index"])
def test_every_routing_matches_the_reference(routing):
    experts = make_experts(dtype=torch.float32, device=DEVICE, **SHAPES["gated_padded"])
    assert_matches_reference(megablocks, experts, few_tokens(routing, 64), FLOAT32)


def test_a_wrong_weight_is_rejected():
    experts = make_experts(dtype=torch.float32, device=DEVICE, **SHAPES["gated_padded"])
    x, index, weights = few_tokens("top_3", 64)
    expected = results(reference, experts, x, index, weights)
    with pytest.raises(AssertionError, match="differs by"):
        assert_same(results(megablocks, experts, x, index, 1.01 * weights), expected, FLOAT32)


@pytest.mark.parametrize("name", MODELS)
def test_models_compute_the_same(name):
    model = build(name, torch.float32, num_hidden_layers=1).to(DEVICE)
    expected = gradients(model, "reference")
    assert_same(gradients(model, "megablocks"), expected, 10 * FLOAT32)


def test_bfloat16():
    """The interpreter's product of bfloat16 is wrong, so there the kernel is only seen to run, in float32 sums."""
    experts = make_experts(dtype=torch.bfloat16, device=DEVICE, **SHAPES["gated_padded"])
    x, index, weights = few_tokens("top_3", 64, torch.bfloat16)
    found = results(megablocks, experts, x, index, weights.float())
    assert {name: t.dtype for name, t in found.items() if name != "weights"} == dict.fromkeys(
        ["output", "x", "gate_up_proj", "down_proj"], torch.bfloat16
    )
    if NATIVE:
        exact = results(reference, experts.double(), x.double(), index, weights.double())
        assert_same({name: t.double() for name, t in found.items()}, exact, 3e-2)


@pytest.mark.parametrize(("tokens", "width"), [(300, BLOCK), (40_000, 2 * BLOCK)])
def test_topology_has_32_bits(tokens, width):
    """Past 32,768 padded tokens a 16-bit index times the block size overflows."""
    index = torch.randint(0, 6, (tokens, 1), generator=torch.Generator().manual_seed(0))
    index[index == 3] = 5
    found, columns = topology(padded_blocks(index, 6), 6, width), width // BLOCK
    rows = [-(-count // BLOCK) for count in index.flatten().bincount(minlength=6).tolist()]
    expert_of_row = [e for e, count in enumerate(rows) for _ in range(count)]
    coordinates = [(row, e * columns + c) for row, e in enumerate(expert_of_row) for c in range(columns)]
    assert found.size() == (sum(rows) * BLOCK, 6 * width)
    assert list(zip(found.row_indices.tolist(), found.column_indices.tolist(), strict=True)) == coordinates
    assert found.offsets.tolist() == list(range(0, len(coordinates) + 1, columns))
    transposed = [coordinates[b] for b in found.block_offsets_t.tolist()]
    assert transposed == sorted(coordinates, key=lambda at: (at[1], at[0]))
    assert found.column_indices_t.tolist() == [row for row, _ in transposed]
    per_column = torch.tensor([column for _, column in coordinates]).bincount(minlength=6 * columns)
    assert found.offsets_t.tolist() == [0, *per_column.cumsum(0).tolist()]
    indices = (found.row_indices, found.column_indices, found.column_indices_t)
    assert {t.dtype for t in (*indices, found.offsets, found.offsets_t, found.block_offsets_t)} == {torch.int32}
    overflown = not torch.equal(found.row_indices.short() * BLOCK, found.row_indices * BLOCK)
    assert overflown == (tokens > 32_768)


def test_too_many_tokens_are_refused(monkeypatch):
    monkeypatch.setattr(blocks, "REACH", BLOCK**2)
    with pytest.raises(ConfigError, match="too many tokens at once"):
        megablocks(make_experts(hidden=64, dtype=torch.float32, device=DEVICE), *few_tokens("top_1", 64))


def test_other_dtypes_are_refused():
    model = build("mixtral", torch.float64)
    with pytest.raises(ConfigError, match="does not compute in this dtype"):
        install_kernel(model, "megablocks", device=torch.device(DEVICE), dtype=torch.float64)


@pytest.mark.gpu
def test_past_32768_padded_tokens():
    experts = make_experts(hidden=256, width=256, dtype=torch.bfloat16, device=DEVICE)
    index = torch.randint(0, 6, (40_000, 1), device=DEVICE)
    x, weights = torch.randn(40_000, 256, device=DEVICE, dtype=torch.bfloat16), torch.rand(40_000, 1, device=DEVICE)
    found = results(megablocks, experts, x, index, weights)
    expected = results(loop, experts.float(), x.float(), index, weights)
    assert_same({name: t.float() for name, t in found.items()}, expected, 3e-2)
