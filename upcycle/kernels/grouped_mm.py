"""transformers' own kernel over `torch.nn.functional.grouped_mm`.

Shapes: S tokens, K experts per token, H hidden.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers.integrations.moe import grouped_mm_experts_forward

from upcycle.errors import ConfigError
from upcycle.kernels.experts import Kernel

if TYPE_CHECKING:
    from torch import Tensor, nn

ALIGNMENT = 16  # bytes; every row of every matrix must begin at a multiple of it
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CAPABILITY = (8, 0)  # of a CUDA device


def grouped_mm(experts: nn.Module, x_SH: Tensor, index_SK: Tensor, weights_SK: Tensor) -> Tensor:
    """The weighted sum [S, H] of each token's experts; arguments as for `reference`."""
    y_SH: Tensor = grouped_mm_experts_forward(experts, x_SH, index_SK, weights_SK)
    return y_SH


def _objection(experts: nn.Module, device: torch.device, dtype: torch.dtype) -> ConfigError | None:
    if dtype not in DTYPES:
        return ConfigError(
            "kernel=grouped_mm does not compute in this dtype",
            found=dtype,
            expected=" or ".join(str(known) for known in DTYPES),
            remedy="kernel=auto",
        )
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < CAPABILITY:
        return ConfigError(
            "kernel=grouped_mm needs a newer GPU",
            found="compute capability {}.{}".format(*torch.cuda.get_device_capability(device)),
            expected="at least {}.{}".format(*CAPABILITY),
            remedy="kernel=loop",
        )
    step = ALIGNMENT // dtype.itemsize
    widths = sorted({size for w in experts.parameters() if w.dim() == 3 for size in w.shape[1:]})
    if any(width % step for width in widths):
        return ConfigError(
            f"kernel=grouped_mm needs rows of a multiple of {ALIGNMENT} bytes",
            found=f"widths {', '.join(map(str, widths))} in {dtype}",
            expected=f"multiples of {step}",
            remedy="kernel=auto, or kernel=loop, which take any width",
        )
    return None


KERNEL = Kernel(name="grouped_mm", forward=grouped_mm, objection=_objection)
