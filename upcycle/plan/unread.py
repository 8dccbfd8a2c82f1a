"""What a dense model's config.json says and the config of a MoE type does not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

# What the conversion answers in its own words, and what says how a model was made or saved.
ANSWERED = frozenset(
    {
        "model_type",
        "architectures",
        "auto_map",
        "dtype",
        "torch_dtype",
        "transformers_version",
        "_name_or_path",
        "intermediate_size",
        "hidden_activation",
        "layer_types",
        "max_window_layers",
        "original_max_position_embeddings",
        "pretraining_tp",
    }
)


def unread_fields(config: Any, written: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields that are lost: those that the dense model's type knows, and those that it does not know itself.

    Args:
        config: the dense model's transformers configuration.
        written: fields of the MoE's config.json, `model_type` among them.
    """
    from transformers import AutoConfig

    kept = AutoConfig.for_model(**written).to_dict()
    known = type(config)().to_dict()
    lost = {
        name: value
        for name, value in config.to_dict().items()
        if name not in ANSWERED and value not in (None, False) and kept.get(name) != value
    }
    return (
        {name: value for name, value in lost.items() if name in known},
        {name: value for name, value in lost.items() if name not in known},
    )
