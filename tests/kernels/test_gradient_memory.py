"""Where the gradients of stacked experts lie."""

from __future__ import annotations

import mmap

import pytest
import torch

from upcycle.kernels.memory import FRESH, empty_like


@pytest.mark.parametrize("huge_pages", [True, False])
@pytest.mark.parametrize("rows", [3, FRESH // 2048 + 1])
def test_any_size_is_an_ordinary_tensor(rows, huge_pages, monkeypatch):
    if not huge_pages:
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    like = torch.empty(2, 1024, rows, dtype=torch.bfloat16).transpose(1, 2)
    made = empty_like(like)
    assert made.shape == like.shape
    assert made.dtype == like.dtype
    assert made.is_contiguous()
    assert made.fill_(1).sum(dtype=torch.float64) == like.numel()


def test_autograd_takes_such_a_gradient_without_copying_it():
    weight = torch.nn.Parameter(torch.ones(FRESH // 4 + 1))
    addresses = []

    class Identity(torch.autograd.Function):
        @staticmethod
        def forward(ctx, w):
            return w.sum()

        @staticmethod
        def backward(ctx, _):
            gradient = empty_like(weight).zero_()
            addresses.append(gradient.data_ptr())
            return gradient

    Identity.apply(weight).backward()
    assert weight.grad.data_ptr() == addresses[0]
