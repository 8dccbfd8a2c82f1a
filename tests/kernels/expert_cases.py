"""Experts, routings, and the comparison of a kernel with the reference: outputs and all gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig

from upcycle.kernels.reference import reference
from upcycle.modeling.configuration_upcycled_moe import UpcycledMoeConfig
from upcycle.modeling.modeling_upcycled_moe import UpcycledMoeExperts

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

EXPERTS, HIDDEN, WIDTH, TOKENS = 6, 32, 24, 40
EMPTY = 3  # the expert that no token visits
# Relative to the largest value of each tensor: the same sums in another order.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 5e-6}


def make_experts(
    *,
    hidden: int = HIDDEN,
    latent: int | None = None,
    width: int = WIDTH,
    activation: str = "silu",
    gated: bool = True,
    bias: bool = False,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> UpcycledMoeExperts:
    """Random experts of which no weight is 0."""
    text_config = AutoConfig.for_model("llama", hidden_size=hidden)
    config = UpcycledMoeConfig(
        text_config=text_config,
        num_experts=EXPERTS,
        num_experts_per_tok=1,
        moe_intermediate_size=width,
        moe_latent_size=latent,
        moe_layers=[0],
        ffn_path="model.layers.{layer}.mlp",
        gated=gated,
        hidden_act=activation,
        ffn_bias=bias,
    )
    torch.manual_seed(0)
    experts = UpcycledMoeExperts(config)
    experts.has_gate, experts.has_bias = gated, bias
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5 if parameter.dim() == 3 else 0.3)
    return experts.to(device, dtype)


def _routed(tokens: int, top_k: int) -> tuple[Tensor, Tensor]:
    """Uneven loads: expert 0 has most tokens and EMPTY has none."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(tokens, EXPERTS, generator=generator, dtype=torch.float64)
    logits += torch.tensor([2.0, 0, 0, 0, -1.0, 0])
    logits[:, EMPTY] = -100.0
    weights, index = logits.softmax(-1).topk(top_k)
    return index, weights


def _dropped() -> tuple[Tensor, Tensor]:
    index, weights = _routed(TOKENS, 2)
    weights[::3, 1] = 0.0
    weights[5] = 0.0
    return index, weights


def _repeated() -> tuple[Tensor, Tensor]:
    index, weights = _routed(TOKENS, 3)
    index[::2, 1] = index[::2, 0]
    return index, weights


ROUTINGS: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "top_1": lambda: _routed(TOKENS, 1),
    "top_3": lambda: _routed(TOKENS, 3),
    "all_experts": lambda: (
        torch.arange(EXPERTS).repeat(TOKENS, 1),
        torch.rand(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(3), dtype=torch.float64),
    ),
    "one_expert": lambda: (torch.full((TOKENS, 1), 4), torch.full((TOKENS, 1), 0.5, dtype=torch.float64)),
    "one_token": lambda: _routed(1, 2),
    "no_tokens": lambda: _routed(0, 2),
    "dropped_pairs": _dropped,
    "repeated_index": _repeated,
}


def inputs(
    routing: str, hidden: int = HIDDEN, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> tuple[Tensor, ...]:
    """Hidden states, indices and weights."""
    index, weights = ROUTINGS[routing]()
    x = torch.randn(len(index), hidden, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return x.to(device, dtype), index.to(device), weights.to(device, dtype)


def results(kernel: Callable[..., Tensor], experts: nn.Module, x: Tensor, index: Tensor, weights: Tensor) -> Any:
    """The output, and the gradients of inputs, routing weights and every parameter, by name."""
    x, weights = x.detach().requires_grad_(), weights.detach().requires_grad_()
    leaves = {"x": x, "weights": weights, **dict(experts.named_parameters())}
    output = kernel(experts, x, index, weights)
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    gradients = torch.autograd.grad(output, list(leaves.values()), direction.to(output), materialize_grads=True)
    return {"output": output.detach(), **dict(zip(leaves, gradients, strict=True))}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """The one assertion of parity, which every mutant must fail."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape, name
        assert found[name].dtype == tensor.dtype, name
        scale = float(tensor.abs().max()) if tensor.numel() else 0.0
        gap = float((found[name] - tensor).abs().max()) if tensor.numel() else 0.0
        assert gap <= tolerance * scale, f"{name} differs by {gap:.2g}, of {scale:.2g}"


def assert_matches_reference(
    kernel: Callable[..., Tensor], experts: nn.Module, arguments: tuple[Tensor, ...], tolerance: float | None = None
) -> None:
    """Outputs and all gradients are the reference's."""
    expected = results(reference, experts, *arguments)
    assert_same(results(kernel, experts, *arguments), expected, tolerance or TOLERANCE[arguments[0].dtype])
