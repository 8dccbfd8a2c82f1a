"""What a GGUF file's metadata says of the computation, as a Hugging Face configuration that computes it, or a refusal.

Transformers' table skips keys that it does not know, and fills in one released model's defaults for what it does not
read. Here every key under the architecture's prefix is honoured (`gguf_keys`, `gguf_rope`), known to change nothing, or
refused by name; and what a field has been given must be what the finished configuration holds.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from upcycle.checkpoint import gguf_keys
from upcycle.checkpoint.gguf_keys import KEYS, Key, refusal
from upcycle.checkpoint.gguf_rope import ROPE_KEYS, Rope
from upcycle.errors import SourceError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from torch import Tensor


def honoured(
    path: Path,
    metadata: Mapping[str, Any],
    parsed: Mapping[str, Any],
    names: Iterable[str],
    rope_tensors: Mapping[str, Tensor],
) -> dict[str, Any]:
    """Return the fields of a configuration that computes what the file says.

    Args:
        path: the file, for errors.
        metadata: every key of the file.
        parsed: fields that transformers' table makes of them.
        names: of the file's tensors.
        rope_tensors: those among `gguf_rope.ROPE_TENSORS`.

    Raises:
        SourceError: a key or tensor means what the model type cannot express, or is not known.
    """
    _check_whole(path, metadata)
    values = _values(path, metadata)
    fields = {**dict.fromkeys(gguf_keys.TOKENS), **parsed}
    fields.pop("rope_theta", None)
    known = _field_names(fields)
    given = {key: _place(path, key, values, known) for key in KEYS if key in values}
    if "layer_types" in known and not values["attention.sliding_window"]:
        del given["attention.sliding_window"]  # said by the types of the layers; the masks are made with some window
    fields |= {field: value for field, value in given.values() if field is not None}
    fields |= {flag: True for end, flag in gguf_keys.BIASES.items() if flag in known and _ends(names, end)}
    fields |= _layer_types(path, values, known)
    fields |= _rope(path, values, rope_tensors, fields)
    _check_kept(path, fields, {key: field for key, (field, _) in given.items() if field is not None})
    return fields


def configuration(path: Path, fields: Mapping[str, Any]) -> Any:
    """Return transformers' configuration of the fields.

    Raises:
        SourceError: transformers refuses a value.
    """
    from huggingface_hub.errors import StrictDataclassError

    try:
        return _config_class(fields).from_dict(dict(fields))
    except (StrictDataclassError, ValueError) as error:
        raise refusal(path, " ".join(str(error).split()), f"what a {fields['model_type']} model can be") from error


def _check_whole(path: Path, metadata: Mapping[str, Any]) -> None:
    if (parts := metadata.get("split.count", 1)) > 1:
        raise SourceError(
            f"{path} is one part of a model",
            found=f"split.count = {parts}",
            expected="the whole model in one file",
            remedy="merge the parts with llama.cpp's llama-gguf-split --merge, or use the model's safetensors files",
        )


def _values(path: Path, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The value of every key, without the architecture's prefix: the file's, or what llama.cpp takes for it."""
    architecture = metadata["general.architecture"]
    stated = {
        key.removeprefix(f"{architecture}."): value
        for key, value in metadata.items()
        if key.startswith(f"{architecture}.")
    }
    _check_known(path, stated)
    values = {key: _of_all_layers(path, key, value) for key, value in stated.items()}
    absent = {name: key.absent for name, key in KEYS.items() if key.absent}
    for name, take in (absent | gguf_keys.ABSENT.get(architecture, {})).items():
        if name not in values and (value := take(values)) is not None:
            values[name] = value
    return values


def _check_known(path: Path, stated: Mapping[str, Any]) -> None:
    known = {*KEYS, *ROPE_KEYS, *gguf_keys.WITHOUT_EFFECT, gguf_keys.WINDOW_PATTERN}
    unknown = [k for k in stated if k not in known and not k.startswith(gguf_keys.WITHOUT_EFFECT_PREFIXES)]
    if unknown:
        shown = ", ".join(f"{key} = {stated[key]}" for key in unknown[:5])
        raise refusal(path, shown, "keys that are known to be computed, or to change nothing")
    missing = [key for key in gguf_keys.REQUIRED if key not in stated]
    if not any(key in stated for key in gguf_keys.NORM_EPSILONS):
        missing.append(" or ".join(gguf_keys.NORM_EPSILONS))
    if missing:
        raise SourceError(
            f"{path} does not say what its model needs",
            found=f"no {', '.join(missing)}",
            remedy="use the model's safetensors files",
        )


def _of_all_layers(path: Path, key: str, value: Any) -> Any:
    """The one value of a key that is written for each layer."""
    if not isinstance(value, list) or key == gguf_keys.WINDOW_PATTERN:
        return value
    if len(set(value)) != 1:
        raise refusal(path, f"{key} = {value}", "one value for all layers")
    return value[0]


def _place(path: Path, key: str, values: Mapping[str, Any], known: frozenset[str]) -> tuple[str | None, Any]:
    """The field that takes a key's value, and what it takes; no field where the value changes nothing."""
    spec, value = KEYS[key], values[key]
    field = next((name for name in spec.fields if name in known), None)
    if field is not None:
        return field, None if spec.zero_is_none and not value else spec.convert(value)
    neutral = _neutral(spec, values)
    if not any(_equal(value, other) for other in neutral):
        raise refusal(path, f"{key} = {value}", " or ".join(map(str, neutral)) or "a model type that has it")
    return None, None


def _neutral(spec: Key, values: Mapping[str, Any]) -> tuple[Any, ...]:
    usual = spec.absent(values) if spec.absent else None
    return spec.neutral if usual is None else (usual, *spec.neutral)


def _equal(one: Any, other: Any) -> bool:
    """Whether two numbers are one, where a file rounds to float32."""
    return bool(abs(one - other) <= 1e-6 * abs(other))


def _ends(names: Iterable[str], end: str) -> bool:
    return any(name.endswith(end) for name in names)


def _layer_types(path: Path, values: Mapping[str, Any], known: frozenset[str]) -> dict[str, Any]:
    """Which layers slide: every n-th attends fully (none with n = 0), or the file says it of each."""
    layers, pattern = values["block_count"], values.get(gguf_keys.WINDOW_PATTERN)
    if "layer_types" not in known:
        if pattern is not None:
            raise refusal(path, f"{gguf_keys.WINDOW_PATTERN} = {pattern}", "all layers alike")
        return {}
    if not values["attention.sliding_window"]:
        return {"layer_types": ["full_attention"] * layers}
    if pattern is None:
        return {}
    slides = (
        pattern
        if isinstance(pattern, list)
        else [not pattern or layer % pattern < pattern - 1 for layer in range(layers)]
    )
    if len(slides) != layers:
        raise refusal(path, f"{gguf_keys.WINDOW_PATTERN} of {len(slides)} layers", f"one of each of {layers} layers")
    return {"layer_types": ["sliding_attention" if slide else "full_attention" for slide in slides]}


def _rope(
    path: Path, values: Mapping[str, Any], tensors: Mapping[str, Tensor], fields: Mapping[str, Any]
) -> dict[str, Any]:
    """The fields of rotary positions."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    usual = getattr(configuration(path, fields), "rope_parameters", None)
    rope = Rope(path, values, tensors, usual)
    nested = usual is not None and "full_attention" in usual

    def frequencies(parameters: Mapping[str, Any]) -> Tensor:
        # The scalings that are asked for do not read the positions; transformers warns of more original ones.
        asked = {**fields, "rope_parameters": {"full_attention": parameters} if nested else dict(parameters)}
        config = configuration(path, {**asked, "max_position_embeddings": 1 << 31})
        inverse: Tensor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](
            config, layer_type="full_attention" if nested else None
        )[0]
        return inverse

    parameters = rope.parameters(frequencies)
    if parameters is None:
        return {}
    original = "original_max_position_embeddings"
    return {"rope_parameters": parameters, **({original: rope.original} if original in _field_names(fields) else {})}


def _check_kept(path: Path, fields: Mapping[str, Any], sources: Mapping[str, str]) -> None:
    """Check that the finished configuration holds what it was given; some types overrule it."""
    config = configuration(path, fields)
    for key, field in sources.items():
        if getattr(config, field) != fields[field]:
            raise refusal(path, f"{key} = {fields[field]}", f"{getattr(config, field)}, all that the model type takes")
    wanted = fields.get("rope_parameters") or {}
    for key, value in wanted.items():
        if config.rope_parameters.get(key) != value:
            raise refusal(path, f"{key} = {value} of rotary positions", config.rope_parameters.get(key))


def _config_class(fields: Mapping[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[fields["model_type"]]


def _field_names(fields: Mapping[str, Any]) -> frozenset[str]:
    """The fields of the model type, by all their names."""
    kind = _config_class(fields)
    return frozenset({*(field.name for field in dataclasses.fields(kind)), *kind.attribute_map})
