"""Which experts take which tokens of held-out text. Knows models, windows of tokens, and what a MoE is.

Shapes: W windows, S tokens of a window, T tokens of a batch, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset

from upcycle.data.corpus import build_corpus
from upcycle.models.load import check_fits, load_checkpoint, load_tokenizer_from
from upcycle.models.moe import describe_moe

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor, nn

    from upcycle.data.config import DataConfig
    from upcycle.data.windows import Windows
    from upcycle.models.moe import MoeDescription


@dataclass(frozen=True, kw_only=True)
class Choices:
    """Tokens that a model read, and the experts that took them.

    Attributes:
        tokens_WS: ids.
        domain_W: name of each window's domain.
        experts: by layer, the indices [W, S, K] of the experts that took each token.
        expert_count: of a layer.
        texts: what each id that was read stands for; a special token stands for nothing.
    """

    tokens_WS: NDArray[np.int64]
    domain_W: NDArray[np.str_]
    experts: dict[int, NDArray[np.int64]]
    expert_count: int
    texts: dict[int, str]


def held_out_choices(checkpoint: Path, data: DataConfig, *, sequence_length: int, windows: int | None) -> Choices:
    """Read held-out text with a MoE checkpoint, in evaluation mode: nothing is dropped and nothing is random.

    Args:
        checkpoint: a directory that `upcycle convert` or `export` wrote.
        data: the text, of which the held-out part is read.
        sequence_length: S.
        windows: windows to read of each domain, from the first; None takes all.

    Raises:
        SourceError: no MoE checkpoint, or one that cannot be loaded.
        ConfigError: the tokenizer or sequence_length does not fit, or the data cannot be used.
    """
    moe, tokenizer = describe_moe(checkpoint), load_tokenizer_from(checkpoint)
    model = load_checkpoint(checkpoint)
    check_fits(model, tokenizer, sequence_length)
    held_out = build_corpus(data, tokenizer, sequence_length=sequence_length).held_out
    tokens_WS, domain_W, experts = read(model, moe, held_out, windows=windows)
    special = set(tokenizer.all_special_ids)
    texts = {int(each): "" if each in special else str(tokenizer.decode([each])) for each in np.unique(tokens_WS)}
    return Choices(tokens_WS=tokens_WS, domain_W=domain_W, experts=experts, expert_count=moe.experts, texts=texts)


@torch.no_grad()
def read(
    model: nn.Module, moe: MoeDescription, held_out: Mapping[str, Windows], *, windows: int | None, batch_size: int = 16
) -> tuple[NDArray[np.int64], NDArray[np.str_], dict[int, NDArray[np.int64]]]:
    """Run a model over windows and note what its routers choose.

    Args:
        model: a MoE in evaluation mode.
        moe: what it is.
        held_out: windows by domain.
        windows: of each domain, from the first; None takes all.
        batch_size: windows per forward pass.

    Returns:
        Ids [W, S], domains [W], and by layer expert indices [W, S, K].
    """
    chosen: dict[int, list[Tensor]] = {layer: [] for layer in moe.layers}

    def note(layer: int) -> Any:
        return lambda _module, _inputs, output: chosen[layer].append(moe.chosen(output))

    hooks = [model.get_submodule(moe.router_path(layer)).register_forward_hook(note(layer)) for layer in moe.layers]
    tokens: list[Tensor] = []
    domains: list[str] = []
    try:
        for domain, dataset in held_out.items():
            used = len(dataset) if windows is None else min(windows, len(dataset))
            for batch in DataLoader(Subset(dataset, range(used)), batch_size=batch_size):
                inputs = {name: values for name, values in batch.items() if name != "labels"}
                model(**inputs, use_cache=False)
                tokens.append(batch["input_ids"])
            domains += [domain] * used
    finally:
        for hook in hooks:
            hook.remove()
    tokens_WS = torch.cat(tokens).numpy()
    experts = {layer: torch.cat(each).reshape(*tokens_WS.shape, -1).numpy() for layer, each in chosen.items()}
    return tokens_WS, np.array(domains), experts
