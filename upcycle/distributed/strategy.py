"""Lightning's strategy for a model that is laid out over ranks already, and its checkpoints: a directory of shards.

last.ckpt -> last.ckpt.200/   a link to the directory of the step, which is whole before the link names it
    *.distcp, .metadata       every rank's part of the model and of the optimizer's state (torch's DCP)
    rest.pt                   what Lightning keeps besides
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from upcycle.distributed.shards import MODEL, OPTIMIZER, REST, going_on, read_rest, reading, writing
from upcycle.files.durable import DRAFT_SUFFIX, replacing, sync_directory

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from upcycle.parallel.rank_layout import RankLayout

# By the parameters' names, so that the state fits another number of ranks, whose groups of parameters are others.
BY_NAME = StateDictOptions(flatten_optimizer_state_dict=True)


class ShardedStrategy(ModelParallelStrategy):
    """Every rank writes its shards, and reads those of another layout too; a checkpoint appears whole or not at all.

    Args:
        layout: of the ranks.
    """

    def __init__(self, layout: RankLayout) -> None:
        super().__init__(data_parallel_size=layout.data, tensor_parallel_size=layout.tp)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The model's parameters, sharded."""
        assert self.model is not None
        return get_model_state_dict(self.model)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's state by the parameters' names, sharded; empty before its first step.

        torch would take a step to have one: without gradients, but it would count.
        """
        assert self.model is not None
        optimizer = self.optimizers[0]
        return get_optimizer_state_dict(self.model, optimizer, options=BY_NAME) if optimizer.state else {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a directory, and let the checkpoint's name link to it.

        Raises:
            OutputError: the files cannot be written; the old checkpoint is intact.
        """
        path = Path(filepath)
        state = {MODEL: checkpoint.pop("state_dict"), OPTIMIZER: checkpoint.pop("optimizer_states")[0]}
        with writing(path):
            name = _made(path, checkpoint["global_step"]) if self.is_global_zero else ""
            target = path.with_name(self.broadcast(name))
            save(state, checkpoint_id=target)
            if self.is_global_zero:
                with replacing(target / REST) as descriptor, os.fdopen(os.dup(descriptor), "wb") as stream:
                    torch.save(checkpoint, stream)
                sync_directory(target)
                _link(path, target)
        self.barrier()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Load model and optimizer, whatever the layout that wrote them; return the rest.

        Raises:
            SourceError: it is damaged.
        """
        assert self.model is not None
        path, model, optimizer = Path(checkpoint_path), self.model, self.optimizers[0]
        with reading(path, going_on(path)):
            weights = {MODEL: get_model_state_dict(model)}
            load(weights, checkpoint_id=path)
            set_model_state_dict(model, weights[MODEL])
            state = {OPTIMIZER: get_optimizer_state_dict(model, optimizer, options=BY_NAME)}
            load(state, checkpoint_id=path)
            set_optimizer_state_dict(model, optimizer, state[OPTIMIZER], options=BY_NAME)
            return read_rest(path)


def _made(path: Path, step: int) -> str:
    """Delete the directories of saves that were cut off, and return the name of a new one."""
    name, linked = f"{path.name}.{step}", path.resolve()
    for each in path.parent.glob(f"{path.name}.*"):
        if each.is_dir() and each.resolve() != linked:
            shutil.rmtree(each, ignore_errors=True)
    if path.with_name(name) == linked:
        name += "-again"
    path.with_name(name).mkdir()
    return name


def _link(path: Path, target: Path) -> None:
    """Let `path` name `target`, in one rename, and delete the directory that it named before."""
    before = path.resolve()
    draft = path.with_name(path.name + DRAFT_SUFFIX)
    draft.unlink(missing_ok=True)
    draft.symlink_to(target.name)
    draft.rename(path)
    sync_directory(path.parent)
    if before != target.resolve():
        shutil.rmtree(before, ignore_errors=True)
