"""Lightning's strategy for a model that is laid out over ranks already, and its checkpoints: a directory of shards.

last.ckpt -> last.ckpt.200/   a link to the directory of the step, which is whole before the link names it
    *.distcp, .metadata       every rank's part of the model and of the optimizer's state (torch's DCP)
    rest.pt                   what Lightning keeps besides
"""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from upcycle.files import DRAFT_SUFFIX, output_errors, replacing, sync_directory

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from upcycle.parallel.rank_layout import RankLayout

MODEL, OPTIMIZER, REST = "state_dict", "optimizer", "rest.pt"
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
        target = path.with_name(f"{path.name}.{checkpoint['global_step']}")
        state = {MODEL: checkpoint.pop("state_dict"), OPTIMIZER: checkpoint.pop("optimizer_states")[0]}
        with output_errors(path):
            if self.is_global_zero:
                shutil.rmtree(target, ignore_errors=True)
                target.mkdir()
            self.barrier()
            save(state, checkpoint_id=target)
            if self.is_global_zero:
                with replacing(target / REST) as descriptor, os.fdopen(os.dup(descriptor), "wb") as stream:
                    torch.save(checkpoint, stream)
                sync_directory(target)
                _link(path, target)
        self.barrier()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Load model and optimizer, whatever the layout that wrote them; return the rest."""
        assert self.model is not None
        path, model, optimizer = Path(checkpoint_path), self.model, self.optimizers[0]
        weights = {MODEL: get_model_state_dict(model)}
        load(weights, checkpoint_id=path)
        set_model_state_dict(model, weights[MODEL])
        state = {OPTIMIZER: get_optimizer_state_dict(model, optimizer, options=BY_NAME)}
        load(state, checkpoint_id=path)
        set_optimizer_state_dict(model, optimizer, state[OPTIMIZER], options=BY_NAME)
        return read_rest(path)


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


def read_rest(path: Path) -> dict[str, Any]:
    """What a sharded checkpoint holds besides model and optimizer."""
    content: dict[str, Any] = torch.load(path / REST, map_location="cpu", weights_only=True)
    return content


def read_sharded(path: Path) -> dict[str, Any]:
    """The whole model of a sharded checkpoint, in this process's memory, as `state_dict`; and the rest."""
    stored = FileSystemReader(path).read_metadata().state_dict_metadata
    weights = {
        name.removeprefix(f"{MODEL}."): torch.empty(tensor.size, dtype=tensor.properties.dtype)
        for name, tensor in stored.items()
        if name.startswith(f"{MODEL}.") and isinstance(tensor, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        load({MODEL: weights}, checkpoint_id=path, no_dist=True)
    return {MODEL: weights, **read_rest(path)}
