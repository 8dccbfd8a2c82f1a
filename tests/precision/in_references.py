"""Writes matrices as TransformerEngine's reference quantizers and torchao do, in a process of its own.

    python in_references.py INPUT OUTPUT

Both packages are on the path. The references are plain torch, but importing them asks for TransformerEngine's compiled
extension, of which they use the numbers of a few types: empty objects stand for it.
"""

from __future__ import annotations

import enum
import importlib
import logging
import os
import sys
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch


class Nothing:
    """Any attribute is 0."""

    def __getattr__(self, name: str) -> int:
        if name.startswith("__"):
            raise AttributeError(name)
        return 0


def _nothing(name: str) -> Nothing:
    if name.startswith("__"):
        raise AttributeError(name)
    return Nothing()


def transformer_engine() -> tuple[Any, Any, Any]:
    """The modules reference_nvfp4, reference_current_scaling and reference_utils."""
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # without its compiled library
    extension: Any = ModuleType("transformer_engine_torch")
    types = "kByte kInt32 kFloat32 kFloat16 kBFloat16 kFloat8E4M3 kFloat8E5M2 kFloat4E2M1"
    extension.DType = enum.IntEnum("DType", types, start=0)
    extension.__getattr__ = _nothing
    sys.modules[extension.__name__] = extension
    spec = find_spec("transformer_engine")
    assert spec is not None
    (place,) = spec.submodule_search_locations or ()
    for name, path in (("transformer_engine", place), ("transformer_engine.pytorch", f"{place}/pytorch")):
        package = ModuleType(name)
        package.__path__ = [path]
        sys.modules[name] = package
    importlib.import_module("transformer_engine.pytorch.tensor")
    recipes = "transformer_engine.pytorch.custom_recipes.reference_"
    nvfp4, current, utils = (importlib.import_module(recipes + each) for each in ("nvfp4", "current_scaling", "utils"))
    return nvfp4, current, utils


def nvfp4_codes(x: torch.Tensor, nvfp4: Any, utils: Any) -> dict[str, torch.Tensor]:
    found = {}
    for name, tile, hadamard in (("nvfp4", (1, 16), False), ("squares", (16, 16), False), ("rotated", (1, 16), True)):
        quantizer = nvfp4.NVFP4QuantizerRef(dtype=utils.Fp4Formats.E2M1, quant_tile_shape=tile, with_rht=hadamard)
        written = quantizer.quantize(x)
        sides = (
            (written.data, written.scale, written.global_amax_row),
            (
                written.data_t,
                written.scale_t,
                written.global_amax_col,
            ),
        )
        for side, (data, scale, amax) in zip(("rows", "columns"), sides, strict=True):
            if not hadamard or side == "columns":
                found[f"{name}/{side}/numbers"] = nvfp4.cast_from_fp4x2(data, torch.float32)
                found[f"{name}/{side}/scale"] = scale.float()
                found[f"{name}/{side}/amax"] = amax
    return found


def current_codes(x: torch.Tensor, current: Any) -> dict[str, torch.Tensor]:
    found = {}
    for name, dtype in (("E4M3", torch.float8_e4m3fn), ("E5M2", torch.float8_e5m2)):
        for powers in (False, True):
            quantizer = current.CurrentScalingQuantizerRef(dtype=dtype, columnwise=False, pow_2_scales=powers)
            written = quantizer.quantize(x)
            found[f"{name}/{powers}/numbers"] = written.data.float()
            found[f"{name}/{powers}/scale"] = written.scale
    return found


def torchao_values(x: torch.Tensor) -> dict[str, torch.Tensor]:
    from torchao.prototype.mx_formats.mx_tensor import MXTensor, ScaleCalculationMode
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

    outer = per_tensor_amax_to_scale(x.abs().max().float())
    mx = MXTensor.to_mx(x, torch.float8_e4m3fn, block_size=32, scaling_mode=ScaleCalculationMode.RCEIL)
    return {
        "torchao/nvfp4": NVFP4Tensor.to_nvfp4(x, per_tensor_scale=outer).dequantize(torch.float32),
        "torchao/mxfp8": mx.dequantize(torch.float32),
    }


def main() -> None:
    source, output = sys.argv[1:]
    nvfp4, current, utils = transformer_engine()
    found = {}
    for case, x in torch.load(source).items():
        written = {**nvfp4_codes(x, nvfp4, utils), **current_codes(x, current)}
        if x.abs().max() > 0:  # torchao divides by zero
            written |= torchao_values(x)
        found |= {f"{case}/{name}": value for name, value in written.items()}
    torch.save(found, output)


if __name__ == "__main__":
    logging.disable()
    main()
