"""One expert after the other, in plain autograd: works on every device and for every activation.

`emulated` is the same with the products that an experts module was given, in low precision (`upcycle/precision`).

Shapes: S tokens, K experts per token, P = S * K pairs, p pairs of one expert, H hidden, R rows of the first projection.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from upcycle.kernels.experts import LOW_PRECISION, Kernel, activate, layout_objection, sort_by_expert, stacked

if TYPE_CHECKING:
    from torch import Tensor, nn

    from upcycle.kernels.experts import Product


def loop(experts: nn.Module, x_SH: Tensor, index_SK: Tensor, weights_SK: Tensor) -> Tensor:
    """The weighted sum [S, H] of each token's experts; arguments as for `reference`."""
    return _loop(experts, x_SH, index_SK, weights_SK, _plain)


def emulated(experts: nn.Module, x_SH: Tensor, index_SK: Tensor, weights_SK: Tensor) -> Tensor:
    """As `loop`, in low precision where the experts were given it."""
    return _loop(experts, x_SH, index_SK, weights_SK, getattr(experts, LOW_PRECISION, _plain))


def _loop(experts: nn.Module, x_SH: Tensor, index_SK: Tensor, weights_SK: Tensor, product: Product) -> Tensor:
    w = stacked(experts)
    pairs = sort_by_expert(index_SK, w.up_NRH.shape[0])
    # unbind, because the gradient of each weight[e] would be a zero tensor as large as all experts together.
    ups, downs = w.up_NRH.unbind(0), w.down_NHI.unbind(0)
    up_biases = (None,) * len(ups) if w.up_bias_NR is None else w.up_bias_NR.unbind(0)
    down_biases = (None,) * len(ups) if w.down_bias_NH is None else w.down_bias_NH.unbind(0)
    weights = weights_SK.flatten()[pairs.pair_P].split(pairs.counts)
    y_SH = torch.zeros_like(x_SH, dtype=torch.promote_types(x_SH.dtype, torch.float32))
    # An expert without tokens takes part too: its gradient is zero, not missing.
    for e, token_p in enumerate(pairs.token_P.split(pairs.counts)):
        h_pI = activate(experts, product(x_SH[token_p], ups[e], up_biases[e], f"{e}.up"))
        y_pH = product(h_pI, downs[e], down_biases[e], f"{e}.down") * weights[e][:, None]
        y_SH.index_add_(0, token_p, y_pH.to(y_SH.dtype))
    return y_SH.to(x_SH.dtype)


def _plain(x_TI: Tensor, w_OI: Tensor, bias_O: Tensor | None, _matrix: str) -> Tensor:
    return F.linear(x_TI, w_OI, bias_O)


KERNEL = Kernel(name="loop", forward=loop, objection=layout_objection)
EMULATED = Kernel(name="emulated", forward=emulated, objection=layout_objection)
