"""What a conversion costs: parameters, bytes, memory, FLOPs per token."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from upcycle.plan.latent import latent_start

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from upcycle.arch.family import DenseModel, Shape
    from upcycle.plan.plan import Plan

BASE_MEMORY = 300 * 10**6


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Costs of a conversion and of the model that comes out.

    What a portable output holds for other engines and is not trained is counted apart: `padding_*`.

    Attributes:
        dense_parameters: of the source, tied weights counted once.
        parameters: of the MoE.
        active_parameters: of the MoE, used per token.
        ahead_parameters: of `parameters`, those for multi-token prediction, which count as neither active nor in FLOPs.
        bytes_to_write: tensor bytes of the output.
        dense_flops_per_token: forward, products with weights (2 per weight), head included, attention scores not.
        flops_per_token: the same for the MoE.
        padding_parameters: zeros.
        padding_flops_per_token: products with them.
        padding_bytes: of `bytes_to_write`, for them and for a second copy of a tied head.
        peak_memory: bytes of anonymous memory that a process of `convert` needs at most.
    """

    dense_parameters: int
    parameters: int
    active_parameters: int
    ahead_parameters: int
    bytes_to_write: int
    dense_flops_per_token: int
    flops_per_token: int
    padding_parameters: int
    padding_flops_per_token: int
    padding_bytes: int
    peak_memory: int


def cost(plan: Plan, model: DenseModel, *, bytes_per_element: Mapping[str, int]) -> Cost:
    """Count a plan's costs.

    Args:
        plan: the plan.
        model: the dense model.
        bytes_per_element: by safetensors code.
    """
    sizes = {tensor.name: math.prod(tensor.shape) for tensor in plan.tensors}
    nbytes = {tensor.name: sizes[tensor.name] * bytes_per_element[tensor.dtype] for tensor in plan.tensors}
    zeros = [tensor for tensor in plan.tensors if tensor.kind == "zeros"]
    copies = [tensor for tensor in plan.tensors if tensor.kind == "copy"]
    total = sum(sizes.values()) - sum(sizes[tensor.name] for tensor in (*zeros, *copies))
    routed = sum(sizes[tensor.name] for tensor in plan.tensors if tensor.kind == "expert")
    ahead = sum(sizes[tensor.name] for tensor in plan.tensors if tensor.kind == "ahead")
    largest = max(math.prod(shape) for shape in model.tensors().values())
    widest = max(bytes_per_element[tensor.dtype] for tensor in plan.tensors)
    dense_flops = dense_matmul_flops(model)
    return Cost(
        dense_parameters=sum(math.prod(shape) for shape in model.tensors().values()),
        parameters=total,
        active_parameters=total - ahead - routed + routed * plan.moe.top_k // plan.moe.experts,
        ahead_parameters=ahead,
        bytes_to_write=sum(nbytes.values()),
        dense_flops_per_token=dense_flops,
        flops_per_token=dense_flops + _extra_flops(plan, model),
        padding_parameters=sum(sizes[tensor.name] for tensor in zeros),
        padding_flops_per_token=2 * _matrix_elements(tensor.shape for tensor in zeros),
        padding_bytes=sum(nbytes[tensor.name] for tensor in (*zeros, *copies)),
        peak_memory=BASE_MEMORY + 3 * largest * widest + _bases(plan, model),
    )


def _bases(plan: Plan, model: DenseModel) -> int:
    """Bytes of the computed projections, three matrices a layer in float32."""
    start = latent_start(plan.moe.latent, plan.init, model.hidden_size)
    if start is None or plan.init.name == "random":
        return 0
    return 3 * 4 * len(plan.moe.layers) * model.hidden_size * (plan.moe.latent or 0)


def dense_matmul_flops(model: DenseModel) -> int:
    """Forward FLOPs per token of the dense model's matrix products with weights."""
    inside = sum(_matrix_elements(model.layer_shapes(layer).values()) for layer in range(model.layers))
    return 2 * (inside + math.prod(model.shape(model.head.shape)))


def _extra_flops(plan: Plan, model: DenseModel) -> int:
    ffn = _matrix_elements(shape for _, shape in model.ffn_shapes())
    moe, neuron = plan.moe, ffn // model.ffn_width
    routed_neuron = neuron // model.hidden_size * (moe.latent or model.hidden_size)
    active = moe.top_k * moe.expert_width * routed_neuron + moe.shared_width * neuron
    always = ("router", "shared_gate", "latent")
    others = sum(math.prod(tensor.shape) for tensor in plan.tensors if tensor.kind in always)
    return 2 * (len(moe.layers) * (active - ffn) + others)


def _matrix_elements(shapes: Iterable[Shape]) -> int:
    return sum(math.prod(shape) for shape in shapes if len(shape) == 2)
