"""Layers that predict the tokens after the next one (multi-token prediction), which transformers does not run.

One block of layers is applied once for every further token (as in Nemotron 3, arXiv 2512.20856; DeepSeek-V3, arXiv
2412.19437, has a block for each).

Shapes: B sequences, L tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from contextlib import contextmanager
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from upcycle.arch.families import FAMILIES
from upcycle.checkpoint import open_reader
from upcycle.errors import ConfigError, SourceError
from upcycle.models.config import read_config
from upcycle.plan.ahead import ahead_family

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from transformers import PreTrainedModel

    from upcycle.arch.family import Ahead, Family

NAME = "mtp"


class AheadBlock(nn.Module):
    """The layers of one depth, under the names that published checkpoints give them.

    Args:
        config: transformers configuration of the model that they belong to.

    Raises:
        ConfigError: its family has no such layers.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        from transformers import AutoConfig, AutoModel

        family = ahead_family(config.model_type)
        fields = {name: value for name, value in config.to_dict().items() if name not in ("dtype", "architectures")}
        assert family.ahead
        alone = AutoConfig.for_model(**{"model_type": family.model_type, **family.ahead.as_model(fields)})
        trunk: Any = AutoModel.from_config(alone, dtype=torch.float32)
        trunk.set_input_embeddings(nn.Identity())
        norm = final_norm(family, trunk)
        self.layers = trunk.layers
        hidden = config.hidden_size
        self.layers[0].enorm, self.layers[0].hnorm = deepcopy(norm), deepcopy(norm)
        self.layers[0].eh_proj = nn.Linear(2 * hidden, hidden, bias=False)
        self.layers[-1].final_layernorm = norm
        self.config = alone
        self._trunk = [trunk]  # in a list: its modules are already this one's

    def forward(self, hidden_BLH: Tensor, embedded_BLH: Tensor) -> Tensor:
        """What predicts the token after the one that is embedded, to be read by the model's own head.

        Args:
            hidden_BLH: the model's output before its head, or this block's for the token before.
            embedded_BLH: the embedding of the next token.
        """
        first = self.layers[0]
        both = torch.cat([first.enorm(embedded_BLH), first.hnorm(hidden_BLH)], dim=-1)
        output: Tensor = self._trunk[0](inputs_embeds=first.eh_proj(both), use_cache=False).last_hidden_state
        return output

    @torch.no_grad()
    def fill(self, stored: Mapping[str, Tensor]) -> None:
        """Take over stored tensors, by their names on disk; routed experts may be stored one by one."""
        for name, parameter in self.layers.state_dict(prefix=f"{NAME}.layers.").items():
            parameter.copy_(stored[name] if name in stored else torch.stack(list(_one_by_one(stored, name))))


def attach(model: PreTrainedModel, kinds: tuple[str, ...] | None = None) -> AheadBlock:
    """Give a model a block, whose weights are to be filled in, and say so in its configuration.

    Args:
        model: of a family that has such layers.
        kinds: of the block's layers; None takes what its configuration says.

    Raises:
        ConfigError: its family has no such layers.
    """
    config: Any = model.config
    ahead = ahead_family(config.model_type).ahead
    assert ahead
    for name, value in ahead.fields(kinds or ahead.pattern(config.to_dict())).items():
        setattr(config, name, value)
    block = AheadBlock(config)
    model.add_module(NAME, block.train(model.training))
    return block


def tells_of_block(model: PreTrainedModel) -> bool:
    """Whether a model's configuration says that it has such layers."""
    ahead = _ahead_of(model)
    return ahead is not None and bool(getattr(model.config, ahead.depths, 0))


def detach(model: PreTrainedModel) -> bool:
    """Say in a model's configuration that it has no such layers; whether it said otherwise."""
    ahead = _ahead_of(model)
    if ahead is None or not tells_of_block(model):
        return False
    setattr(model.config, ahead.depths, 0)
    return True


def load_block(model: PreTrainedModel, directory: Path) -> AheadBlock | None:
    """Give a model the block that a checkpoint has; None where its config.json tells of none.

    Raises:
        ConfigError: it tells of several, of which only one is run.
        SourceError: the files do not have it.
    """
    ahead = _ahead_of(model)
    fields = read_config(directory)
    depths = fields.get(ahead.depths, 0) if ahead else 0
    if ahead is None or not depths:
        return None
    if depths != 1:
        raise ConfigError(
            "only one block for multi-token prediction is run, applied as often as asked",
            found=f"{ahead.depths}={depths}",
            expected="1",
            remedy="set mtp.start=none, copy or random",
        )
    reader = open_reader(directory)
    stored = {name: reader.read(name) for name in reader.tensors if name.startswith(ahead.prefix)}
    if not stored:
        raise SourceError(
            "config.json tells of layers for multi-token prediction that the files do not have",
            found=f"{ahead.depths}={depths} in {directory}",
            remedy=f"set {ahead.depths} to 0, or download the complete checkpoint",
        )
    block = attach(model, ahead.pattern(fields))
    block.fill(stored)
    return block


def _ahead_of(model: PreTrainedModel) -> Ahead | None:
    """What the model's family has for multi-token prediction."""
    family = FAMILIES.get(model.config.model_type)
    return family.ahead if family else None


@contextmanager
def before_head(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """A list to which every forward pass adds what the head takes, [B, L, H]."""
    seen: list[Tensor] = []
    head: Any = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _head, inputs: seen.append(inputs[0]))
    try:
        yield seen
    finally:
        handle.remove()


def ahead_logits(
    model: PreTrainedModel, block: AheadBlock, hidden_BLH: Tensor, labels_BL: Tensor, *, depths: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits [B, L - k, V] and the tokens that they should predict [B, L - k], for every depth k from 1.

    At position t, depth k knows the tokens up to t + k, and predicts the one after it.

    Args:
        model: the block's model.
        block: applied once for each depth, to its own output.
        hidden_BLH: what the model's head takes.
        labels_BL: the token after each position.
        depths: how many.
    """
    embed: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    for depth in range(1, depths + 1):
        hidden_BLH = block(hidden_BLH[:, :-1], embed(labels_BL[:, depth - 1 : -1]))
        yield head(hidden_BLH), labels_BL[:, depth:]


def final_norm(family: Family, base: Any) -> nn.Module:
    """The norm behind the last layer of a model without its head."""
    name = next(name for name, symbols in family.outer.items() if symbols == "H")
    norm: nn.Module = getattr(base, name.split(".")[-2])
    return norm


def stored_tensors(model: PreTrainedModel) -> Callable[[str], Tensor]:
    """Returns tensors of a model by their names on disk, where routed experts are stored one by one."""
    family, state = FAMILIES[model.config.model_type], model.state_dict()

    def read(name: str) -> Tensor:
        own = family.in_memory(name)
        tensor: Tensor | None = state.get(own)
        if tensor is not None:
            return tensor
        stem, expert, matrix, _ = own.rsplit(".", 3)
        of_all: Tensor = state[f"{stem}.{matrix}"]
        return of_all[int(expert)]

    return read


def _one_by_one(stored: Mapping[str, Tensor], stacked: str) -> Iterator[Tensor]:
    stem, _, matrix = stacked.rpartition(".")
    expert = 0
    while (name := f"{stem}.{expert}.{matrix}.weight") in stored:
        yield stored[name]
        expert += 1


def ahead_block(model: PreTrainedModel) -> AheadBlock | None:
    """The block of a model that has one."""
    block = getattr(model, NAME, None)
    return block if isinstance(block, AheadBlock) else None
