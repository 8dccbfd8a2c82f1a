"""Large gradients on a CPU without a page fault for every 4 KB.

glibc maps every block over 32 MB afresh, and the gradient of the stacked experts of one layer is larger than that: its
page faults cost as much as a tenth of a training step.
"""

from __future__ import annotations

import math
import mmap

import torch

FRESH = 32 * 2**20  # bytes; the largest value of glibc's dynamic mmap threshold on 64-bit machines


def empty_like(tensor: torch.Tensor) -> torch.Tensor:
    """An uninitialised contiguous tensor of a tensor's shape and dtype; on Linux, a large one lies in huge pages."""
    nbytes = math.prod(tensor.shape) * tensor.element_size()
    if nbytes < FRESH or tensor.device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty_like(tensor, memory_format=torch.contiguous_format)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape)
