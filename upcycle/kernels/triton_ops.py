"""The Triton kernels of MegaBlocks and stk, imported when first needed.

Of MegaBlocks only the file of its Triton kernels is loaded: the package itself imports a CUDA extension that has to be
compiled, and of which nothing is needed here.
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class TritonOps:
    """Modules.

    Attributes:
        stk: the package; `stk.ops` has the block-sparse products.
        copies: MegaBlocks' gathers and scatters to and from padded rows.
    """

    stk: Any
    copies: Any


@functools.cache
def triton_ops() -> TritonOps:
    """Import both.

    Raises:
        ImportError: MegaBlocks is not installed; what stk and Triton raise on import varies.
    """
    stk = import_module("stk")
    import_module("stk.ops")
    package = importlib.util.find_spec("megablocks")
    if package is None or package.origin is None:
        raise ImportError("No module named 'megablocks'")
    file = Path(package.origin).parent / "backend" / "kernels.py"
    spec = importlib.util.spec_from_file_location("upcycle_megablocks_kernels", file)
    assert spec is not None
    assert spec.loader is not None
    copies = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copies)
    return TritonOps(stk=stk, copies=copies)


def why_missing() -> str | None:
    """What stands in the way of the import, or None."""
    try:
        triton_ops()
    except Exception as error:  # a broken GPU stack raises anything, RuntimeError and OSError among it
        return f"{type(error).__name__}: {error}"
    return None
