"""How large a checkpoint is, and what generating with it keeps: from headers, or from config.json alone."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from upcycle.arch.families import FAMILIES
from upcycle.arch.family import describe
from upcycle.arch.mixing import cache_bytes
from upcycle.checkpoint import code_from_name, dtype_bytes, has_weights, open_reader
from upcycle.models.config import load_config

if TYPE_CHECKING:
    from pathlib import Path

    from upcycle.models.moe import MoeDescription


class Header(NamedTuple):
    """Elements and safetensors code of a tensor."""

    elements: int
    dtype: str


def stored_sizes(directory: Path, moe: MoeDescription | None) -> dict[str, Any]:
    """Tensors, parameters, bytes, and the cache in the checkpoint's narrowest dtype.

    Parameters of layers for multi-token prediction are counted among all, and not among the active ones.

    Args:
        directory: of the checkpoint.
        moe: what mixture it is; None for a dense model.

    Raises:
        SourceError: no weights there, and config.json alone does not say which tensors there are.
    """
    config = load_config(directory)
    tensors, files = _headers(directory, config)
    family = FAMILIES.get(config.model_type)
    ahead = family.ahead.prefix if family and family.ahead else None
    parameters = sum(header.elements for header in tensors.values())
    beyond = sum(header.elements for name, header in tensors.items() if ahead and name.startswith(ahead))
    routed = sum(tensors[name].elements for name in moe.expert_names() if name in tensors) if moe else 0
    dtypes = sorted({header.dtype for header in tensors.values()})
    element = min(map(dtype_bytes, dtypes), default=0)
    pairs, states = cache_bytes(config.get_text_config(), element=element)
    return {
        "tensors": len(tensors),
        "files": files,
        "parameters": parameters,
        "ahead_parameters": beyond,
        "active_parameters": parameters - beyond - routed + (routed * moe.top_k // moe.experts if moe else 0),
        "bytes": sum(header.elements * dtype_bytes(header.dtype) for header in tensors.values()),
        "dtypes": dtypes,
        "cache_bytes_per_token": pairs,
        "cache_bytes_per_sequence": states,
    }


def _headers(directory: Path, config: Any) -> tuple[dict[str, Header], int]:
    """Every tensor by name, and in how many files they are."""
    family = FAMILIES.get(config.model_type)
    if has_weights(directory) or family is None:
        reader = open_reader(directory)
        stored = reader.tensors.items()
        return {name: Header(math.prod(info.shape), info.dtype) for name, info in stored}, len(reader.files)
    code = code_from_name(str(config.dtype or "bfloat16").removeprefix("torch."))
    return {name: Header(math.prod(shape), code) for name, shape in describe(family, config).tensors().items()}, 0
