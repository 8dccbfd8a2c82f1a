"""What a GPU and the links between GPUs can do; `conf/gpu/` has the vendor's figures. Knows no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import yaml  # type: ignore[import-untyped]
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

from upcycle.errors import ConfigError
from upcycle.options.config import STRICT


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """`gpu=h100`: peaks as the vendor states them, links in one direction.

    Attributes:
        name: what it is called.
        memory: bytes.
        flops: dense BF16 FLOP/s, without sparsity.
        hbm: bytes/s of its memory.
        nvlink: bytes/s to the other GPUs of its node.
        network: bytes/s to other nodes, per GPU.
        gpus_per_node: GPUs that NVLink connects.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    name: str
    memory: float
    flops: float
    hbm: float
    nvlink: float
    network: float
    gpus_per_node: int


@dataclass(frozen=True, kw_only=True)
class GpuFile:
    """`gpu=FILE`: a YAML file with the fields of `Gpu`."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    file: str


@dataclass(frozen=True, kw_only=True)
class Group:
    """Ranks that communicate: `size` of them, `stride` apart."""

    size: int
    stride: int = 1

    def in_a_node(self, gpu: Gpu) -> int:
        """Members that share a node."""
        return max(1, min(self.size, gpu.gpus_per_node // self.stride))


def checked_gpu(given: Gpu | GpuFile) -> Gpu:
    """The GPU that was asked for.

    Raises:
        ConfigError: its file cannot be read, or a figure is missing, unknown or not positive.
    """
    gpu = given if isinstance(given, Gpu) else _read(given.file)
    for name in (field.name for field in fields(gpu) if field.name != "name"):
        if getattr(gpu, name) <= 0:
            raise ConfigError(f"gpu.{name} is out of range", found=getattr(gpu, name), expected="more than 0")
    return gpu


def _read(file: str) -> Gpu:
    names = ", ".join(field.name for field in fields(Gpu))
    try:
        plain: Any = OmegaConf.to_container(OmegaConf.load(os.path.expanduser(file)), resolve=True)
        return TypeAdapter(Gpu).validate_python(plain)
    except FileNotFoundError as error:
        raise ConfigError("the file of the GPU does not exist", found=file, expected="a YAML file") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"{part}: " for part in first["loc"])
        raise ConfigError(
            "the file does not describe a GPU",
            found=f"{file}: {where}{first['msg']}",
            expected=names,
            remedy="start from conf/gpu/h100.yaml",
        ) from error
    except (yaml.YAMLError, OmegaConfBaseException, OSError) as error:
        raise ConfigError(
            "the file of the GPU cannot be read", found=f"{file}: {str(error).splitlines()[0]}", expected="a YAML file"
        ) from error
