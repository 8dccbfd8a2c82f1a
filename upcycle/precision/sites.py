"""Which matrices of a model are multiplied in low precision: by what they belong to, never by a model's name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn
from transformers.pytorch_utils import Conv1D

from upcycle.arch.families import FAMILIES
from upcycle.arch.family import Ffn
from upcycle.arch.mixing import mixers
from upcycle.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

    from upcycle.models.moe import MoeDescription

SITES = ("ffn", "experts", "shared", "attention", "mamba2")


@dataclass(frozen=True, kw_only=True)
class Matrices:
    """A linear module, or the stacked experts of a layer.

    Attributes:
        name: of the module.
        module: the module.
        layer: its layer's index.
        site: one of SITES.
    """

    name: str
    module: nn.Module
    layer: int
    site: str


def matrices(model: PreTrainedModel, moe: MoeDescription | None) -> Iterator[Matrices]:
    """Everything in the layers that could be multiplied in low precision, in their order.

    Routers, gates of shared experts, shared experts that are there for their type alone, latent projections, norms,
    convolutions, embeddings, heads and layers for multi-token prediction are never among them.

    Args:
        model: of a family or type that upcycle knows.
        moe: its shape; None for a dense model.

    Raises:
        ConfigError: a dense model of another family.
    """
    text = model.config.get_text_config()
    family, mixing = FAMILIES.get(text.model_type), mixers(text)
    if moe:
        layer_path = moe.layer_path
    elif family:
        layer_path = family.in_memory(family.layer)
    else:
        raise ConfigError(
            "the matrices of this model have no recipe of low precision",
            found=f"model_type={text.model_type}",
            expected=", ".join(FAMILIES),
            remedy="precision=bfloat16",
        )
    ffn = family.ffn if family else Ffn()
    kinds = family.layer_kinds(text.to_dict(), len(mixing)) if family else ("",) * len(mixing)
    for layer, (kind, mixer) in enumerate(zip(kinds, mixing, strict=True)):
        start = layer_path.format(layer=layer)
        named: dict[str, str] = {}
        within: tuple[str, ...] = ()
        if moe and layer in moe.layers:
            path = moe.experts_path(layer)
            yield Matrices(name=path, module=model.get_submodule(path), layer=layer, site="experts")
            layout = moe.target.layout
            shared = layout.shared.values() if moe.shared_width > (layout.shared_least or 0) else ()
            named = {each.format(ffn=moe.ffn).removesuffix(".weight"): "shared" for each in shared}
            within = tuple(each.removeprefix(start) for each in moe.block_paths(layer))
        elif family is None or family.kinds[kind].ffn:
            named = {f"{ffn.module}.{each}": "ffn" for each in (ffn.gate, ffn.up, ffn.down) if each}
            within = (ffn.module,)
        for name, module in model.get_submodule(start.removesuffix(".")).named_modules():
            if isinstance(module, nn.Linear | Conv1D):
                inside = any(name == each or name.startswith(f"{each}.") for each in within)
                site = named.get(name) if inside else mixer
                if site:
                    yield Matrices(name=start + name, module=module, layer=layer, site=site)
