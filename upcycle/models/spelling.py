"""config.json in the words of older transformers too, which newer ones read and find nothing new in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from upcycle.arch.target import Target


def with_old_words(config: Mapping[str, Any], target: Target) -> dict[str, Any]:
    """A native type's config.json with what transformers 4 reads in the place of `rope_parameters` and renamed fields.

    Without the first, transformers 4 takes the type's default rotary base, without a message.
    """
    if target.spelling:
        return target.spelling(config)
    if target.generic:
        return dict(config)
    rope = dict(config["rope_parameters"])
    old = {"rope_theta": rope.pop("rope_theta")}
    if rope.get("rope_type", "default") != "default":
        old["rope_scaling"] = rope
    return {**config, **old, **{name: config[today] for name, today in target.old_names.items()}}
