"""Element types."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import _TYPES

from upcycle.checkpoint import TORCH_DTYPES, code_from_name, dtype_bytes, dtype_code, dtype_name, torch_dtype
from upcycle.errors import SourceError


def test_agrees_with_safetensors():
    assert _TYPES.items() <= TORCH_DTYPES.items()


@pytest.mark.parametrize("code", TORCH_DTYPES)
def test_round_trip(code):
    assert dtype_code(torch_dtype(code)) == code
    assert code_from_name(dtype_name(code)) == code
    assert dtype_bytes(code) == torch.empty((), dtype=torch_dtype(code)).element_size()


def test_unknown():
    with pytest.raises(SourceError, match=r"found:    F31\n  expected: did you mean F32"):
        torch_dtype("F31")
    with pytest.raises(SourceError, match="found:    bfloat61\n  expected: did you mean bfloat16"):
        code_from_name("bfloat61")
    with pytest.raises(SourceError, match="complex128"):
        dtype_code(torch.complex128)
