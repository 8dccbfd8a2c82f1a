"""Element types: safetensors codes, torch dtypes, sizes in bytes and configuration names. Knows torch only."""

from __future__ import annotations

from typing import Final

import torch

from upcycle.errors import SourceError, near_misses

# Source: safetensors 0.8 `Dtype`. The sub-byte types (F4, F6_*) are left out: no element has a whole number of bytes.
TORCH_DTYPES: Final[dict[str, torch.dtype]] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
_CODES: Final[dict[torch.dtype, str]] = {dtype: code for code, dtype in TORCH_DTYPES.items()}


def torch_dtype(code: str) -> torch.dtype:
    """Return the torch dtype of a safetensors code.

    Raises:
        SourceError: the code is not a whole-byte safetensors type.
    """
    if code not in TORCH_DTYPES:
        raise SourceError("unsupported tensor element type", found=code, expected=near_misses(code, TORCH_DTYPES))
    return TORCH_DTYPES[code]


def dtype_code(dtype: torch.dtype) -> str:
    """Return the safetensors code of a torch dtype.

    Raises:
        SourceError: safetensors cannot store that dtype.
    """
    if dtype not in _CODES:
        raise SourceError("safetensors cannot store this element type", found=dtype, expected=", ".join(TORCH_DTYPES))
    return _CODES[dtype]


def dtype_bytes(code: str) -> int:
    """Return the size of one element in bytes.

    Raises:
        SourceError: the code is not a whole-byte safetensors type.
    """
    return torch_dtype(code).itemsize


def dtype_name(code: str) -> str:
    """Return the name that configurations use for a code: "BF16" -> "bfloat16".

    Raises:
        SourceError: the code is not a whole-byte safetensors type.
    """
    return str(torch_dtype(code)).removeprefix("torch.")


def code_from_name(name: str) -> str:
    """Return the safetensors code of a configuration's dtype name: "bfloat16" -> "BF16".

    Raises:
        SourceError: no element type has that name.
    """
    names = {dtype_name(code): code for code in TORCH_DTYPES}
    if name not in names:
        raise SourceError("unknown dtype name", found=name, expected=near_misses(name, names))
    return names[name]
