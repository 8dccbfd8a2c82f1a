"""Dense against MoE on real text: what they give, every FFN block's output, whole FFNs."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from upcycle.arch.head import head_of
from upcycle.checkpoint import sha256_file
from upcycle.errors import ConfigError, SourceError
from upcycle.models.config import read_config
from upcycle.models.load import ffn_modules, load_checkpoint, load_dense
from upcycle.models.manifest import read_manifest
from upcycle.models.moe import MoeDescription, describe_moe
from upcycle.models.source import open_source
from upcycle.models.text import DEFAULT_TEXT, sample_tokens
from upcycle.routing.ratios import ratio
from upcycle.routing.statistics import whole_ffns
from upcycle.verify.outputs import outputs_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from transformers import PreTrainedModel

    from upcycle.options.config import VerifyConfig
    from upcycle.verify.outputs import Outputs


@dataclass(kw_only=True)
class Sums:
    """Sums over tokens.

    Attributes:
        error, norm: by layer, squared norms of the FFN output's difference and of the dense FFN's output.
        routed, whole: by layer, tokens routed, and those whose selected experts make whole FFNs.
    """

    error: dict[int, float] = field(default_factory=dict)
    norm: dict[int, float] = field(default_factory=dict)
    routed: dict[int, int] = field(default_factory=dict)
    whole: dict[int, int] = field(default_factory=dict)


def verify(config: VerifyConfig) -> dict[str, Any]:
    """Measure how far a MoE checkpoint is from the dense model that it came from, in float32.

    The FFN error of a layer is |MoE(x) - FFN(x)| / |FFN(x)| over all tokens, both on the dense model's own input x: 0
    where both outputs are zero everywhere, None where only the dense FFN's is, or where one is not finite. The gap of
    the losses is None where it is no number either.

    Args:
        config: the options.

    Returns:
        The report as plain data; `passed` says whether |MoE loss - dense loss| <= tolerance * dense loss, or of reward
        models whether the mean square of MoE scores - dense scores is <= tolerance * that of the dense scores, over all
        positions.

    Raises:
        UpcycleError: a source, a checkpoint or a text that cannot be used.
    """
    if config.tokens < 2 or config.sequence_length < 2:
        found = f"tokens={config.tokens}, sequence_length={config.sequence_length}"
        raise ConfigError("too few tokens to predict one", found=found, expected="at least 2 of each")
    directory = Path(config.moe).expanduser()
    moe = describe_moe(directory)
    source = open_source(config.source)
    vocabulary = source.model.sizes["V"]
    if moe.vocabulary != vocabulary or moe.layer_count != source.model.layers:
        raise SourceError(
            "the MoE did not come from this dense model",
            found=f"{moe.layer_count} layers, vocabulary {moe.vocabulary}",
            expected=f"{source.model.layers} layers, vocabulary {vocabulary}",
            remedy="give the source that the MoE's upcycle_manifest.json names",
        )
    head = source.model.head
    if head_of(read_config(directory)) is not head:
        raise SourceError(
            "the MoE and the dense model have different heads",
            found=f"architectures={read_config(directory).get('architectures')}",
            expected=f"a {head.name} head, as the dense model has",
            remedy="give the source that the MoE's upcycle_manifest.json names",
        )
    file = Path(config.text).expanduser() if config.text else DEFAULT_TEXT
    ids = sample_tokens(source, tokens=config.tokens, file=file)
    length = min(config.sequence_length, source.model.sizes["P"])
    if length < 2:
        raise ConfigError("the model has too few positions to predict a token", found=length, expected="at least 2")
    sums, outputs = Sums(), outputs_of(head)
    dense_model, moe_model = load_dense(source), load_checkpoint(directory)
    with torch.inference_mode():
        for chunk in ids.split(length):
            if len(chunk) > 1:
                _measure(chunk[None], dense_model, moe_model, source.model.ffn_module(), moe, sums, outputs)
    return _report(config, moe, sums, outputs, file, len(ids), read_manifest(directory))


def _measure(
    ids: Tensor,
    dense: PreTrainedModel,
    model: PreTrainedModel,
    ffn_path: str,
    moe: MoeDescription,
    sums: Sums,
    outputs: Outputs,
) -> None:
    blocks = {layer: moe_block(model, moe, layer) for layer in moe.layers}
    with _compare_ffns(ffn_modules(dense, ffn_path, moe.layers), blocks, sums):
        of_dense = outputs.of(dense, ids)
    routers = {layer: reduce(getattr, moe.router_path(layer).split("."), model) for layer in moe.layers}
    with _count_whole(routers, moe, sums):
        of_moe = outputs.of(model, ids)
    outputs.compare(of_dense, of_moe, ids)


def moe_block(model: nn.Module, moe: MoeDescription, layer: int) -> list[nn.Module]:
    """The modules whose outputs together replace the dense FFN's output."""
    found = [reduce(getattr, path.split("."), model) for path in moe.block_paths(layer)]
    return [module for module in found if module is not None]


@contextmanager
def _compare_ffns(ffns: Mapping[int, nn.Module], blocks: Mapping[int, list[nn.Module]], sums: Sums) -> Iterator[None]:
    def watch(layer: int) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            replaced = torch.stack([block(args[0]) for block in blocks[layer]]).sum(0)
            sums.error[layer] = sums.error.get(layer, 0.0) + float((replaced - output).double().square().sum())
            sums.norm[layer] = sums.norm.get(layer, 0.0) + float(output.double().square().sum())

        return hook

    with _hooks({ffn: watch(layer) for layer, ffn in ffns.items()}):
        yield


@contextmanager
def _count_whole(routers: Mapping[int, nn.Module], moe: MoeDescription, sums: Sums) -> Iterator[None]:
    def watch(layer: int) -> Any:
        def hook(_module: nn.Module, _args: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
            whole = whole_ffns(moe.chosen(output), moe.granularity)
            sums.whole[layer] = sums.whole.get(layer, 0) + int(whole.sum())
            sums.routed[layer] = sums.routed.get(layer, 0) + len(whole)

        return hook

    with _hooks({router: watch(layer) for layer, router in routers.items()}):
        yield


@contextmanager
def _hooks(hooks: Mapping[nn.Module, Any]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _report(
    config: VerifyConfig,
    moe: MoeDescription,
    sums: Sums,
    outputs: Outputs,
    file: Path,
    tokens: int,
    manifest: Mapping[str, Any] | None,
) -> dict[str, Any]:
    errors = {layer: ratio(sums.error[layer] ** 0.5, sums.norm[layer] ** 0.5) for layer in moe.layers}
    known = [error for error in errors.values() if error is not None]
    layers = [
        {
            "layer": layer,
            "ffn_relative_error": errors[layer],
            "whole_ffns": sums.whole[layer] / sums.routed[layer],
        }
        for layer in moe.layers
    ]
    return {
        "source": config.source,
        "moe": config.moe,
        "model_type": moe.model_type,
        "name": moe.name,
        "text": {"file": file.name, "sha256": sha256_file(file), "tokens": tokens},
        "dtype": "float32",
        **outputs.found(config.tolerance),
        "whole_ffns": sum(sums.whole.values()) / sum(sums.routed.values()),
        "max_ffn_relative_error": max(known) if len(known) == len(errors) else None,
        "layers": layers,
        "expected_losses": manifest["losses"] if manifest else None,
        "tolerance": config.tolerance,
    }
