"""Runs a script that uses Megatron-Bridge on a CPU, and by a Python before 3.12: python without_gpu.py SCRIPT ...

Empty modules stand for packages that Megatron-Bridge imports and that need a GPU to be built or used, or that have
nothing to do with a recipe: Transformer Engine (whose layers Megatron-Bridge trains with), ModelOpt (quantization,
distillation), NVIDIA's resiliency extension (restarts within a process), Energon and qwen_vl_utils (images). Nothing of
them can be run. Megatron-Core is imported before, so it finds no Transformer Engine and keeps to its own layers; only
the version is there for its checks of a configuration. mamba-ssm, whose kernels Megatron-Core's Mamba-2 layers are made
of, is `mamba_on_cpu.py`.
"""

from __future__ import annotations

import importlib
import runpy
import sys
import typing
from contextlib import nullcontext
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import mamba_on_cpu
import torch
import typing_extensions

VERSION = "2.16.1"  # of Transformer Engine, in requirements.txt
EMPTY = """
transformer_engine transformer_engine.pytorch transformer_engine.pytorch.ops
modelopt modelopt.torch modelopt.torch.opt modelopt.torch.opt.plugins
modelopt.torch.distill modelopt.torch.distill.plugins modelopt.torch.distill.plugins.megatron
nvidia_resiliency_ext nvidia_resiliency_ext.inprocess
megatron.energon megatron.energon.epathlib megatron.energon.epathlib.epath
megatron.energon.flavors megatron.energon.flavors.base_dataset
megatron.energon.flavors.webdataset megatron.energon.flavors.webdataset.base_webdataset
megatron.energon.task_encoder megatron.energon.task_encoder.base megatron.energon.task_encoder.cooking
qwen_vl_utils
"""
MAMBA = "mamba_ssm mamba_ssm.ops mamba_ssm.ops.triton"
KERNELS = ("layernorm_gated", "ssd_combined")


class Empty(ModuleType):
    """A module in which every name is an empty class."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (), {"__class_getitem__": classmethod(lambda cls, _: cls)})
        setattr(self, name, made)
        return made


def stand_in(name: str) -> None:
    """Put an empty module where an import looks for it."""
    module = sys.modules[name] = Empty(name)
    module.__path__ = []
    module.__spec__ = ModuleSpec(name, None, is_package=True)
    parent, _, last = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], last, module)


def without_gpu() -> None:
    """Import Megatron-Core, then put the empty modules in place, and the CPU for the current GPU."""
    typing.override = typing_extensions.override  # type: ignore[attr-defined]  # Python 3.12
    for name in MAMBA.split():
        stand_in(name)
    for name in KERNELS:
        sys.modules[f"mamba_ssm.ops.triton.{name}"] = mamba_on_cpu
    for name in ("distributed", "models.gpt.gpt_layer_specs", "optimizer"):
        importlib.import_module(f"megatron.core.{name}")
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    for name in EMPTY.split():
        stand_in(name)
    sys.modules["transformer_engine"].__version__ = VERSION
    device: Any = "cpu"
    torch.cuda.current_device = lambda: device
    CudaRNGStatesTracker.fork = lambda self, name="": nullcontext()  # no dropout is drawn


if __name__ == "__main__":
    without_gpu()
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
