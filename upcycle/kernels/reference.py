"""The slow kernel that defines the truth: every token visits its experts one after the other.

Shapes: S tokens, K experts per token, H hidden.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from upcycle.kernels.experts import Kernel, activate, layout_objection, stacked

if TYPE_CHECKING:
    from torch import Tensor, nn


def reference(experts: nn.Module, x_SH: Tensor, index_SK: Tensor, weights_SK: Tensor) -> Tensor:
    """The weighted sum of each token's experts.

    Args:
        experts: stacked experts of transformers.
        x_SH: hidden states [S, H].
        index_SK: experts of each token [S, K].
        weights_SK: their weights [S, K], in any floating dtype.

    Returns:
        [S, H] in the dtype of `x_SH`.
    """
    w = stacked(experts)
    y_SH = []
    for x_H, index_K, weights_K in zip(x_SH, index_SK.tolist(), weights_SK, strict=True):
        y_H = torch.zeros_like(x_H, dtype=torch.promote_types(x_H.dtype, torch.float32))
        for k, e in enumerate(index_K):
            up_bias_R = None if w.up_bias_NR is None else w.up_bias_NR[e]
            down_bias_H = None if w.down_bias_NH is None else w.down_bias_NH[e]
            h_I = activate(experts, F.linear(x_H, w.up_NRH[e], up_bias_R))
            y_H = y_H + weights_K[k] * F.linear(h_I, w.down_NHI[e], down_bias_H)
        y_SH.append(y_H.to(x_H.dtype))
    return torch.stack(y_SH) if y_SH else x_SH.clone()


KERNEL = Kernel(name="reference", forward=reference, objection=layout_objection)
