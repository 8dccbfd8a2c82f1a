"""Throughput of kernels over the dense FFN's at equal active FLOPs, in bfloat16, on three shapes."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from cases import make_experts, routed
from needs import device, milliseconds, say

from upcycle.kernels.select import KERNELS

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    Forward = Callable[[Any, Tensor, Tensor, Tensor], Tensor]

# E, G, T, hidden, width of the dense FFN, tokens
SHAPES = {
    "E8G1T1 4096": (8, 1, 1, 4096, 14336, 16384),
    "E8G8T8 2048": (8, 8, 8, 2048, 8192, 16384),
    "E8G8T8 576": (8, 8, 8, 576, 1536, 65536),
}
TINY = {"E2G2T2 32": (2, 2, 2, 32, 64, 64)}  # on a CPU, to see that it runs
NAMES = ("loop", "grouped_mm", "megablocks")
FLOPS = 18  # of a gated FFN forward and backward, per token, hidden and width


def liger(experts: Any, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    made: Tensor = LigerFusedMoEFunction.apply(x, experts.gate_up_proj, experts.down_proj, index, weights)
    return made


def matrix(rows: int, columns: int, card: torch.device) -> Tensor:
    return torch.randn(rows, columns, device=card, dtype=torch.bfloat16).mul_(columns**-0.5).requires_grad_()


def timed(forward: Callable[[], Tensor], leaves: list[Tensor], direction: Tensor) -> float:
    """Milliseconds of forward and backward, into gradients that are not there yet."""

    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        forward().backward(direction)

    return milliseconds(run)


def dense(x: Tensor, direction: Tensor, width: int) -> float:
    gate_up, down = matrix(2 * width, x.shape[1], x.device), matrix(x.shape[1], width, x.device)

    def forward() -> Tensor:
        gate, up = F.linear(x, gate_up).chunk(2, -1)
        return F.linear(F.silu(gate) * up, down)

    return timed(forward, [x, gate_up, down], direction)


def sparse(name: str, forward: Forward, experts: Any, x: Tensor, direction: Tensor, top_k: int) -> float | str:
    """Milliseconds, or why there are none."""
    error = KERNELS[name].objection(experts, x.device, x.dtype) if name in KERNELS else None
    if error:
        return f"refused: {error.what}"
    index, weights = routed(len(x), experts.num_experts, top_k, x.device)
    weights = weights.to(x.dtype).requires_grad_()
    try:
        return timed(lambda: forward(experts, x, index, weights), [x, weights, *experts.parameters()], direction)
    except Exception as failure:  # one kernel's failure is a result, and leaves the others theirs
        return f"failed: {type(failure).__name__}: {str(failure)[:120]}"


def measure(shape: tuple[int, ...], card: torch.device) -> dict[str, str]:
    e, g, t, hidden, width, tokens = shape
    torch.manual_seed(0)
    x = torch.randn(tokens, hidden, device=card, dtype=torch.bfloat16, requires_grad=True)
    direction = torch.randn_like(x)
    base = dense(x, direction, width) * t / g
    found = {"dense": f"{FLOPS * tokens * hidden * width * t / g / base / 1e9:.0f} TFLOP/s"}
    experts = make_experts(e * g, hidden, width // g, card, torch.bfloat16)
    kernels: dict[str, Forward] = {name: KERNELS[name].forward for name in NAMES}
    if find_spec("liger_kernel"):
        kernels["liger"] = liger
    for name, forward in kernels.items():
        took = sparse(name, forward, experts, x, direction, t)
        found[name] = took if isinstance(took, str) else f"{base / took:.2f} of dense"
    return found


def main() -> None:
    card = device()
    shapes = SHAPES if card.type == "cuda" else TINY
    rows = {name: measure(shape, card) for name, shape in shapes.items()}
    say({f"{shape} {name}": value for shape, row in rows.items() for name, value in row.items()})


if __name__ == "__main__":
    main()
