"""Where the gradients of stacked experts lie."""

from __future__ import annotations

import mmap

import pytest
import torch

from upcycle.kernels.memory import FRESH, zeros_like


@pytest.mark.parametrize("huge_pages", [True, False])
@pytest.mark.parametrize("rows", [3, FRESH // 2048 + 1])
def test_zeros_of_any_size_are_ordinary_tensors(rows, huge_pages, monkeypatch):
    if not huge_pages:
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    like = torch.empty(2, 1024, rows, dtype=torch.bfloat16).transpose(1, 2)
    zeros = zeros_like(like)
    assert zeros.shape == like.shape
    assert zeros.dtype == like.dtype
    assert zeros.is_contiguous()
    assert not zeros.any()
    zeros += 1
    assert zeros.sum(dtype=torch.float64) == like.numel()


def test_autograd_takes_such_a_gradient_without_copying_it():
    weight = torch.nn.Parameter(torch.ones(FRESH // 4 + 1))
    addresses = []

    class Identity(torch.autograd.Function):
        @staticmethod
        def forward(ctx, w):
            return w.sum()

        @staticmethod
        def backward(ctx, _):
            gradient = zeros_like(weight)
            addresses.append(gradient.data_ptr())
            return gradient

    Identity.apply(weight).backward()
    assert weight.grad.data_ptr() == addresses[0]
