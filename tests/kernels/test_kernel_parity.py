"""Every kernel against the reference: outputs and all gradients. MegaBlocks has a file of its own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from expert_cases import (
    HIDDEN,
    ROUTINGS,
    TOLERANCE,
    assert_matches_reference,
    assert_same,
    inputs,
    make_experts,
    results,
)
from torch.utils.checkpoint import checkpoint

from upcycle.kernels.experts import activate
from upcycle.kernels.fused import fused, group_experts
from upcycle.kernels.grouped_mm import grouped_mm
from upcycle.kernels.loop import loop
from upcycle.kernels.reference import reference

KERNELS = [loop, fused, grouped_mm]
NO_FLOAT64 = (grouped_mm, torch.float64)
SHAPES = {
    "swiglu": {},
    "geglu": {"activation": "gelu_pytorch_tanh"},
    "relu2": {"activation": "relu2", "gated": False},
    "gelu_biases": {"activation": "gelu_new", "gated": False, "bias": True},
    "linear": {"activation": "linear", "gated": False},
    "silu_biases": {"activation": "silu", "gated": False, "bias": True},
    "swiglu_biases": {"bias": True},
}


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("kernel", "dtype"), [(k, d) for k in KERNELS for d in TOLERANCE if (k, d) != NO_FLOAT64])
def test_outputs_and_gradients_are_the_references(kernel, dtype, shape, routing):
    assert_matches_reference(kernel, make_experts(dtype=dtype, **SHAPES[shape]), inputs(routing, dtype=dtype))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_experts_in_fewer_dimensions(kernel, shape):
    """Half the hidden size: kernels read sizes from the weights, and nowhere else."""
    experts = make_experts(latent=HIDDEN // 2, dtype=torch.float32, **SHAPES[shape])
    assert experts.down_proj.shape[1] == HIDDEN // 2
    assert_matches_reference(kernel, experts, inputs("top_3", hidden=HIDDEN // 2, dtype=torch.float32))


def test_the_reference_is_the_sum_over_experts():
    experts = make_experts(bias=True)
    x, index, weights = inputs("repeated_index")
    dense = torch.stack(
        [
            F.linear(activate(experts, F.linear(x, up, up_bias)), down, down_bias)
            for up, up_bias, down, down_bias in zip(
                experts.gate_up_proj,
                experts.gate_up_proj_bias,
                experts.down_proj,
                experts.down_proj_bias,
                strict=True,
            )
        ],
        dim=1,
    )
    expected = sum(weights[:, k, None] * dense[torch.arange(len(x)), index[:, k]] for k in range(index.shape[1]))
    torch.testing.assert_close(reference(experts, x, index, weights), expected, rtol=1e-12, atol=1e-12)


def shifted(experts, x, index, weights):
    return loop(experts, x, (index + 1) % 6, weights)


def unweighted(experts, x, index, weights):
    return loop(experts, x, index, torch.ones_like(weights) + 0 * weights)


def without_router_gradient(experts, x, index, weights):
    return loop(experts, x, index, weights.detach()) + 0 * weights.sum()


def last_pair_dropped(experts, x, index, weights):
    mask = torch.ones_like(weights)
    mask[-1, -1] = 0
    return loop(experts, x, index, weights * mask)


@pytest.mark.parametrize("mutant", [shifted, unweighted, without_router_gradient, last_pair_dropped])
def test_a_wrong_kernel_is_rejected(mutant):
    with pytest.raises(AssertionError, match="differs by"):
        assert_matches_reference(mutant, make_experts(dtype=torch.float32), inputs("top_3", dtype=torch.float32))


def test_swapped_gate_and_up_are_rejected():
    experts = make_experts()
    expected = results(reference, experts, *inputs("top_3"))
    with torch.no_grad():
        experts.gate_up_proj.copy_(experts.gate_up_proj.roll(experts.gate_up_proj.shape[1] // 2, dims=1))
    with pytest.raises(AssertionError, match="differs by"):
        assert_same(results(fused, experts, *inputs("top_3")), expected, TOLERANCE[torch.float64])


@pytest.mark.parametrize("kernel", KERNELS)
def test_bfloat16_with_float32_routing_weights(kernel):
    experts = make_experts(dtype=torch.bfloat16, bias=True)
    x, index, weights = inputs("top_3", dtype=torch.bfloat16)
    found = results(kernel, experts, x, index, weights.float())
    assert found["output"].dtype == torch.bfloat16
    exact = results(reference, experts.double(), x.double(), index, weights.double())
    # 8 bits of every intermediate: about 1% of the largest value.
    assert_same({name: t.double() for name, t in found.items()}, exact, 3e-2)


@pytest.mark.parametrize("routing", ["top_1", "top_3", "all_experts", "one_expert", "no_tokens"])
def test_groups_hold_every_pair_once(routing):
    _, index, _ = inputs(routing)
    groups = group_experts(index, 6)
    pairs = torch.cat([group.pair_bm.flatten() for group in groups]) if groups else torch.empty(0)
    assert sorted(pairs[pairs < index.numel()].tolist()) == list(range(index.numel()))
    for group in groups:
        for expert, pair_m in zip(range(6)[group.experts], group.pair_bm, strict=True):
            assert set(index.flatten()[pair_m[pair_m < index.numel()]].tolist()) == {expert}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_activations_give_the_same_gradients(kernel, reentrant):
    experts, arguments = make_experts(dtype=torch.float32), inputs("top_3", dtype=torch.float32)

    def recomputed(*arguments):
        return checkpoint(kernel, *arguments, use_reentrant=reentrant)

    if reentrant:  # it has no torch.autograd.grad

        def gradients(function):
            experts.zero_grad()
            x, index, weights = arguments
            function(experts, x.requires_grad_(), index, weights).square().sum().backward()
            return {name: parameter.grad.clone() for name, parameter in experts.named_parameters()}

        assert_same(gradients(recomputed), gradients(kernel), 0.0)
    else:
        assert_same(results(recomputed, experts, *arguments), results(kernel, experts, *arguments), 0.0)


def test_fused_says_that_it_differentiates_once():
    x, index, weights = inputs("top_1")
    output = fused(make_experts(), x.requires_grad_(), index, weights)
    (gradient,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_fused_takes_gradients_of_any_stride_and_leaves_none_behind():
    experts, (x, index, weights) = make_experts(), inputs("top_3")
    x.requires_grad_()
    fused(experts, x, index, weights).sum().backward()  # a gradient of stride 0
    expected = torch.autograd.grad(reference(experts, x, index, weights).sum(), x)[0]
    torch.testing.assert_close(x.grad, expected, rtol=1e-12, atol=1e-12)
    before = experts.down_proj.grad.clone()
    fused(experts, x, index, weights).sum().backward()
    torch.testing.assert_close(experts.down_proj.grad, 2 * before, rtol=1e-12, atol=1e-12)


def test_fused_computes_in_the_dtype_of_autocast():
    experts, (x, index, weights) = make_experts(dtype=torch.float32), inputs("top_3", dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = fused(experts, x, index, weights)
    low = make_experts(dtype=torch.bfloat16)
    low.load_state_dict(experts.state_dict())
    assert found.dtype == torch.float32
    assert torch.equal(found, fused(low, x.bfloat16(), index, weights).float())
