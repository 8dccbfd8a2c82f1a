"""Has transformers lay out a model over the ranks as it loads it."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.distributed.fsdp import FSDPModule

from upcycle.distributed.quiet import only_errors
from upcycle.errors import ConfigError, UpcycleError
from upcycle.kernels.select import experts_modules
from upcycle.models.transformers_version import LAYS_OUT, installed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from upcycle.parallel.rank_layout import RankLayout


@contextmanager
def laid_out(layout: RankLayout) -> Iterator[dict[str, Any]]:
    """Yield what `from_pretrained` is called with, so that every rank loads its shard; nothing for one rank.

    Experts exchange tokens with an all-to-all in evaluation too: transformers' other ways hand kernels tokens of
    experts that are elsewhere.

    Raises:
        ConfigError: the model's type has no plan for the layout, or transformers is too old to have any.
    """
    if layout.ranks == 1:
        yield {}
        return
    if installed() < LAYS_OUT:
        needed = ".".join(map(str, LAYS_OUT))
        raise ConfigError(
            "training over several ranks needs a newer transformers",
            found=version("transformers"),
            expected=f"{needed} or later",
            remedy=f"pip install 'transformers>={needed}', or train in one process",
        )
    from transformers.distributed.configuration_utils import DistributedConfig

    config = DistributedConfig(
        dp_replicate_size=layout.replicate,
        fsdp_size=layout.fsdp,
        tp_size=layout.tp,
        ep_size=layout.ep,
        ep_implementation="all_to_all",
    )
    try:
        # Every rank would say it; and what the report of the weights is about, `from_pretrained` of load.py checks.
        with only_errors("transformers"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="DTensor random operators may not have complete support")
            yield {"distributed_config": config, "ignore_mismatched_sizes": True}
    except UpcycleError:
        raise
    except ValueError as error:
        raise ConfigError(
            "the model cannot be laid out over the ranks like this",
            found=f"{layout}: {' '.join(str(error).split())}",
            remedy="choose another layout, such as parallel=fsdp",
        ) from error


def check_units(model: nn.Module) -> None:
    """Check that FSDP gathers a model layer by layer.

    transformers' default plan goes by names. In a family with other names it matches nothing, and all but the experts
    would be one unit, which every rank gathers whole.

    Raises:
        ConfigError: it does not.
    """
    layers = next(each for each in model.modules() if isinstance(each, nn.ModuleList))
    if not all(isinstance(layer, FSDPModule) for layer in layers):
        raise ConfigError(
            "transformers has no plan that gathers this family layer by layer: every rank would hold the whole model",
            found=type(model).__name__,
            remedy="train it in one process, or take a model of another family",
        )


def settle(model: nn.Module) -> None:
    """Prepare a model that is laid out for training.

    The all-to-all brings experts tokens of their own rank's experts alone, so they need to mask none. And FSDP2 cannot
    reduce the gradient of a tensor without elements, such as those of Qwen2-MoE's shared expert of width 0.
    """
    for experts in experts_modules(model):
        experts._is_expert_parallel = False
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.numel() > 0)
