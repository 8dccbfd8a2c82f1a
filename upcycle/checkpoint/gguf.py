"""Reads GGUF files as Hugging Face tensors, one dequantised tensor at a time. Alone in this room it knows transformers.

Names and value transforms are transformers' own (`modeling_gguf_pytorch_utils`), so that a tensor read here equals the
one `from_pretrained(…, gguf_file=…)` loads. The configuration is what the metadata says (`gguf_meaning`).
"""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

import torch

from upcycle.checkpoint.dtypes import torch_dtype
from upcycle.checkpoint.gguf_keys import refusal
from upcycle.checkpoint.gguf_meaning import configuration, honoured
from upcycle.checkpoint.gguf_rope import ROPE_TENSORS
from upcycle.checkpoint.tensors import TensorInfo
from upcycle.errors import SourceError, listed
from upcycle.options.extras import need

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_HALVES: Final = ("F16", "BF16")
# What gguf and transformers raise on damaged bytes; their readers check little before they index.
_DAMAGE: Final = (ValueError, LookupError, ArithmeticError, struct.error, TypeError)


class GgufReader:
    """Reads a dense causal language model from one GGUF file.

    Quantised tensors come out as float32; matrices stored as F16 or BF16 keep their type. Vectors always come out as
    float32: the transforms that do arithmetic (norms stored as w + 1) act on vectors, and half precision would round.

    Args:
        path: the `.gguf` file.

    Raises:
        MissingPackageError: gguf is not installed.
        SourceError: the file is damaged, its architecture is unknown to transformers' GGUF tables or is not a dense
            causal language model, tensors of the model are missing from it, or it has a key or tensor that the model
            would not compute with.
    """

    unlisted: Final = frozenset[str]()

    def __init__(self, path: Path) -> None:
        self.files = (path,)
        need("a GGUF file", "gguf")
        with _reporting_damage(path):
            from gguf import GGUFReader

            self._stored = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
        architecture, parsed = _parsed_config(path)
        self._processor = _processor(architecture, parsed)
        shapes, tied, self._hf_names = _model_names(path, parsed, self._processor)
        self._gguf_names = {hf: name for name, hf in self._hf_names.items() if name in self._stored}
        self._check_one_to_one(path)
        missing = shapes.keys() - self._gguf_names.keys() - tied
        if missing:
            raise SourceError(f"{path} lacks tensors of its model", found=f"no {', '.join(sorted(missing))}")
        self._check_all_placed(path, parsed["model_type"])
        self.tensors = {
            hf: TensorInfo(name=hf, dtype=self._dtype(name), shape=shapes[hf], file=path)
            for name in self._stored
            if (hf := self._hf_names.get(name)) is not None
        }
        for hf, info in self.tensors.items():
            stored = self._stored[self._gguf_names[hf]]
            if stored.n_elements != math.prod(info.shape):
                raise _wrong_shape(info, tuple(reversed(stored.shape.tolist())))

    def read(self, name: str) -> torch.Tensor:
        """Return the dequantised tensor in the shape of the Hugging Face model; see `TensorReader.read`."""
        info = self.tensors[name]
        stored = self._stored[self._gguf_names[name]]
        delivered: dict[str, torch.Tensor] = {}
        with _reporting_damage(info.file):
            from gguf.quants import dequantize

            result = self._processor.process(
                weights=dequantize(stored.data, stored.tensor_type),
                name=stored.name,
                tensor_key_mapping=self._hf_names,
                parsed_parameters={"tensors": delivered},
            )
        # Some processors hand the tensor over under its final name instead of returning it (GPT-2's output).
        tensor = delivered[name] if result.name is None else _owned(result.weights)
        if tuple(tensor.shape) != info.shape:
            raise _wrong_shape(info, tuple(tensor.shape))
        return tensor.to(torch_dtype(info.dtype)).contiguous()

    def _dtype(self, gguf_name: str) -> str:
        stored = self._stored[gguf_name]
        kept = stored.tensor_type.name in _HALVES and len(stored.shape) > 1
        return str(stored.tensor_type.name) if kept else "F32"

    def _check_one_to_one(self, path: Path) -> None:
        fused = [hf for hf, count in Counter(self._hf_names[name] for name in self._present()).items() if count > 1]
        if fused:
            raise SourceError(
                f"{path} holds a model whose experts are already split",
                found=f"several GGUF tensors for {fused[0]}",
                expected="a dense model",
            )

    def _check_all_placed(self, path: Path, model_type: str) -> None:
        unplaced = sorted(self._stored.keys() - self._hf_names.keys() - ROPE_TENSORS)
        if unplaced:
            raise refusal(path, listed(unplaced), f"tensors that a {model_type} model has a place for")

    def _present(self) -> list[str]:
        return [name for name in self._stored if name in self._hf_names]


def gguf_config(path: Path) -> dict[str, Any]:
    """Return the Hugging Face configuration of a GGUF file as `config.json` would hold it.

    It carries `model_type`, `architectures` and the right `tie_word_embeddings`, and no `quantization_config`: the
    tensors that this room reads are dequantised.

    Raises:
        MissingPackageError: gguf is not installed.
        SourceError: the file is damaged, its architecture is unknown, or it says what such a model does not compute.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = configuration(path, _parsed_config(path)[1])
    content: dict[str, Any] = json.loads(config.to_json_string())
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        content.pop(key, None)
    # The text holds what differs from the defaults, and the default of tying has changed between versions.
    content["tie_word_embeddings"] = config.tie_word_embeddings
    if config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        content["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    return content


def write_gguf_tokenizer(path: Path, directory: Path) -> tuple[str, ...]:
    """Write the tokenizer that a GGUF file carries, chat template included, as Hugging Face files.

    Args:
        path: the `.gguf` file.
        directory: where the files go; it must exist.

    Returns:
        The names of the files written, sorted.

    Raises:
        SourceError: the file is damaged or its tokenizer is of an unknown kind.
    """
    from transformers import AutoTokenizer

    with _reporting_damage(path):
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name, local_files_only=True)
    before = set(directory.rglob("*"))
    tokenizer.save_pretrained(str(directory))
    written = [file for file in directory.rglob("*") if file.is_file() and file not in before]
    return tuple(sorted(file.relative_to(directory).as_posix() for file in written))


def _parsed_config(path: Path) -> tuple[str, dict[str, Any]]:
    """Return the GGUF architecture name and the fields of the Hugging Face configuration that the metadata means."""
    need("a GGUF file", "gguf")
    with _reporting_damage(path):
        status = path.stat()
    return _parse(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=1)
def _parse(path: Path, _size: int, _modified: int) -> tuple[str, dict[str, Any]]:
    from transformers import modeling_gguf_pytorch_utils as tables
    from transformers.integrations.gguf.reader import read_gguf_metadata

    with _reporting_damage(path):
        metadata, names = read_gguf_metadata(str(path))
        architecture = metadata["general.architecture"]
        if architecture not in tables.GGUF_SUPPORTED_ARCHITECTURES:
            raise SourceError(
                f"{path} has an architecture that cannot be read from GGUF",
                found=architecture,
                expected=", ".join(sorted(tables.GGUF_SUPPORTED_ARCHITECTURES)),
                remedy="use the model's safetensors files",
            )
        parsed: dict[str, Any] = tables.load_gguf_checkpoint(str(path))["config"]
        return architecture, honoured(path, metadata, parsed, names, _rope_tensors(path, names))


def _rope_tensors(path: Path, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """The file's tensors of rotary positions, as float32."""
    if not ROPE_TENSORS.intersection(names):
        return {}
    from gguf import GGUFReader
    from gguf.quants import dequantize

    stored = [tensor for tensor in GGUFReader(path).tensors if tensor.name in ROPE_TENSORS]
    return {tensor.name: _owned(dequantize(tensor.data, tensor.tensor_type)).float() for tensor in stored}


def _processor(architecture: str, parsed: dict[str, Any]) -> Any:
    """Return transformers' transform of GGUF values for an architecture."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    config = dict(parsed)
    # llama.cpp leaves the count out where it equals the heads, and transformers then skips un-permuting q and k.
    if "num_attention_heads" in config:
        config.setdefault("num_key_value_heads", config["num_attention_heads"])
    make: Any = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
    return make(config=config)


def _model_names(
    path: Path, parsed: dict[str, Any], processor: Any
) -> tuple[dict[str, tuple[int, ...]], set[str], dict[str, str]]:
    """Return the model's tensor shapes by name, the names tied to another, and GGUF names to model names."""
    from transformers import AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

    config = configuration(path, parsed)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        names: dict[str, str] = get_gguf_hf_weights_map(_Flat(model), processor)
    except (ValueError, NotImplementedError) as error:
        raise SourceError(
            f"{path} cannot be read as a causal language model", found=error, remedy="use the model's safetensors files"
        ) from error
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return shapes, set(model.all_tied_weights_keys), names


class _Flat:
    """A model without sub-modules: transformers rebuilds its table of names for each (9 s for 30 layers)."""

    def __init__(self, model: Any) -> None:
        self.config = model.config
        self.state_dict = model.state_dict

    def named_children(self) -> Iterator[tuple[str, Any]]:
        return iter(())


def _wrong_shape(info: TensorInfo, found: tuple[int, ...]) -> SourceError:
    return SourceError(
        f"{info.file} holds {info.name} in another shape than its metadata implies", found=found, expected=info.shape
    )


def _owned(weights: Any) -> torch.Tensor:
    """Return an array's values as a tensor, copied only out of the read-only mapped file."""
    return torch.from_numpy(weights if weights.flags.writeable else weights.copy())


@contextmanager
def _reporting_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except SourceError:
        raise
    except OSError as error:
        raise SourceError(f"cannot read {path}", found=error) from error
    except NotImplementedError as error:
        raise SourceError(
            f"{path} holds values that cannot be dequantised", found=error, remedy="use another quantisation"
        ) from error
    except _DAMAGE as error:
        raise SourceError(
            f"{path} is not a readable GGUF file",
            found=f"{path.stat().st_size} bytes; {type(error).__name__}: {error}",
            expected="a complete GGUF file of version 2 or 3",
            remedy="the file is truncated or corrupt; copy or download it again",
        ) from error
