"""What a checkpoint is: architecture, MoE shape, provenance, sizes, similarity of its experts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from torch import Tensor

from upcycle.arch.target import matrices
from upcycle.checkpoint import TensorReader, has_weights, open_reader
from upcycle.models.config import read_config
from upcycle.models.manifest import read_manifest
from upcycle.models.moe import MoeDescription, describe_moe, target_of
from upcycle.verify.stored import stored_sizes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from upcycle.options.config import InspectConfig

ELEMENTS_AT_ONCE = 2**20


def inspect(config: InspectConfig) -> dict[str, Any]:
    """Describe a checkpoint as plain data.

    Raises:
        SourceError: no checkpoint there, or one that cannot be read.
    """
    directory = Path(config.path).expanduser()
    raw = read_config(directory)
    moe = describe_moe(directory) if target_of(raw) else None
    found: dict[str, Any] = {
        "path": config.path,
        "model_type": raw.get("model_type"),
        "architectures": raw.get("architectures"),
        "sizes": stored_sizes(directory, moe),
    }
    if moe:
        found["moe"] = _shape(moe)
        found["similarity"] = similarity(open_reader(directory), moe) if has_weights(directory) else []
    manifest = read_manifest(directory)
    if manifest and "source" in manifest:
        kept = ("source", "config", "init", "seed", "plan_sha256", "versions", "losses")
        found["provenance"] = {name: manifest[name] for name in kept}
    if manifest and "training" in manifest:
        trained = manifest["training"]
        found["training"] = {"model": trained["config"]["model"], "step": trained["step"], **trained["summary"]}
    return found


def similarity(reader: TensorReader, moe: MoeDescription) -> list[dict[str, Any]]:
    """Mean cosine between experts' weights, by layer.

    `across_groups` compares experts that hold the same shard (e*G+g with the same g): 1 right after a lossless
    conversion, falling as experts specialise. `within_group` compares different shards of one group; None where G = 1.
    All zeros equal all zeros.
    """
    layers = []
    for layer in moe.layers:
        gram = sum(_gram(weights) for weights in _expert_matrices(reader, moe, layer))
        assert isinstance(gram, Tensor)
        norm = gram.diagonal().sqrt()
        cosine = gram / (norm[:, None] * norm).clamp_min(torch.finfo(torch.float64).tiny)
        cosine[(norm[:, None] == 0) & (norm == 0)] = 1.0
        expert = torch.arange(moe.experts)
        group, position = expert // moe.granularity, expert % moe.granularity
        other = ~torch.eye(moe.experts, dtype=torch.bool)
        across = (position[:, None] == position) & other
        within = (group[:, None] == group) & other
        layers.append({"layer": layer, "across_groups": _mean(cosine, across), "within_group": _mean(cosine, within)})
    return layers


def _expert_matrices(reader: TensorReader, moe: MoeDescription, layer: int) -> Iterator[list[Tensor]]:
    """For each stored matrix of a layer, its flattened weights expert by expert."""
    layout, start = moe.target.layout, moe.stored_layer.format(layer=layer)
    for matrix in matrices(layout.experts, gated=moe.gated):
        name = layout.experts[matrix]
        if "{expert}" in name:
            yield [reader.read(start + name.format(expert=each)).flatten() for each in range(moe.experts)]
        else:
            yield list(reader.read(start + name.format(ffn=moe.ffn)).flatten(1))


def _gram(weights: list[Tensor]) -> Tensor:
    """Inner products of all pairs, [N, N] in float64, a slice of the weights at a time."""
    total = torch.zeros(len(weights), len(weights), dtype=torch.float64)
    for start in range(0, len(weights[0]), ELEMENTS_AT_ONCE):
        part = torch.stack([weight[start : start + ELEMENTS_AT_ONCE].float() for weight in weights])
        total += (part @ part.T).double()
    return total


def _mean(values: Tensor, mask: Tensor) -> float | None:
    return float(values[mask].mean()) if mask.any() else None


def _shape(moe: MoeDescription) -> dict[str, Any]:
    return {
        "name": moe.name,
        "experts": moe.experts,
        "top_k": moe.top_k,
        "expert_width": moe.expert_width,
        "shared_width": moe.shared_width,
        "latent": moe.latent,
        "granularity": moe.granularity,
        "groups": moe.groups,
        "router_order": moe.router_order,
        "layers": list(moe.layers),
        "layer_count": moe.layer_count,
    }


def inspection_table(found: Mapping[str, Any]) -> RenderableType:
    """The description for people."""
    table = Table(box=box.SIMPLE, show_header=False, title=found["path"])
    sizes = found["sizes"]
    table.add_row("type", found["model_type"])
    active = f" ({sizes['active_parameters']:,} active)" if "moe" in found else ""
    if sizes["ahead_parameters"]:
        active += f", {sizes['ahead_parameters']:,} of them for multi-token prediction,"
    stored = f"in {sizes['tensors']:,} tensors ({', '.join(sizes['dtypes'])})"
    table.add_row("parameters", f"{sizes['parameters']:,}{active} {stored}")
    table.add_row("size", f"{sizes['bytes'] / 1e9:.3f} GB in {sizes['files']} files")
    states = f", {sizes['cache_bytes_per_sequence']:,} for a sequence" if sizes["cache_bytes_per_sequence"] else ""
    table.add_row("cache", f"{sizes['cache_bytes_per_token']:,} bytes for a token{states}")
    if "moe" not in found:
        return table
    moe = found["moe"]
    layers = f"{len(moe['layers'])} of {moe['layer_count']}"
    table.add_row(
        "MoE", f"{moe['name']}: {moe['experts']} experts of width {moe['expert_width']}, {moe['top_k']} active"
    )
    groups = f", groups {moe['groups']}" if moe["granularity"] > 1 else ""
    table.add_row("router", moe["router_order"] + groups)
    table.add_row("shared width", str(moe["shared_width"]))
    if moe["latent"]:
        table.add_row("latent", f"routed experts compute in {moe['latent']} dimensions")
    table.add_row("MoE layers", layers)
    for name, value in (*_provenance(found.get("provenance")), *_training(found.get("training"))):
        table.add_row(name, value)
    return Group(table, _similarity_table(found["similarity"])) if found["similarity"] else table


def _provenance(provenance: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    if provenance is None:
        return [("provenance", "no upcycle_manifest.json")]
    init, versions = provenance["init"], provenance["versions"]
    return [
        ("made from", provenance["source"]["given"]),
        ("by", f"upcycle {versions['upcycle']}, seed {provenance['seed']}"),
        ("init", f"{init['name']}, scaling {init['scaling']}, router std {init['router_std']:g}"),
        ("plan", provenance["plan_sha256"]),
        ("step 0", "; ".join(provenance["losses"]) or "lossless"),
    ]


def _training(training: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    if training is None:
        return []
    figures = [f"{name} {value:,.6g}" for name, value in training.items() if name not in ("model", "step")]
    return [("trained", f"model={training['model']}, {training['step']:,} steps"), ("", "; ".join(figures))]


def _similarity_table(layers: list[Mapping[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE, title="mean cosine between experts")
    for column in ("layer", "same shard, across groups", "different shards, within a group"):
        table.add_column(column, justify="right")
    for layer in layers:
        cells = (layer["across_groups"], layer["within_group"])
        table.add_row(str(layer["layer"]), *("-" if value is None else f"{value:.6f}" for value in cells))
    return table
