"""The folding of a recipe: what was asked for, and where nothing was, the best that fits."""

from __future__ import annotations

from dataclasses import astuple, replace
from typing import TYPE_CHECKING

from upcycle.errors import ConfigError
from upcycle.parallel.gpu import checked_gpu
from upcycle.parallel.search import Request, search

if TYPE_CHECKING:
    from upcycle.parallel.config import WorkloadConfig
    from upcycle.parallel.sizes import ModelSizes
    from upcycle.parallel.step import Step
    from upcycle.train.config import ExportConfig


def choose(config: ExportConfig, sizes: ModelSizes, workload: WorkloadConfig, *, model_type: str) -> Step:
    """The fastest step that fits and has the degrees that were given.

    Raises:
        ConfigError: there is none.
    """
    assert config.parallel
    assert config.gpu
    if config.nodes < 1:
        raise ConfigError("nodes is out of range", found=config.nodes, expected="1 or more")
    parallel = config.parallel
    if model_type == "olmoe":
        if parallel.tp not in (None, 1):
            raise ConfigError(
                "Megatron-Bridge's OLMoE normalises queries and keys over all heads, so TP cannot split them",
                found=f"parallel.tp={parallel.tp}",
                expected="parallel.tp=1",
            )
        parallel = replace(parallel, tp=1)
    request = Request(
        parallel=parallel, sizes=sizes, workload=workload, gpu=checked_gpu(config.gpu), nodes=config.nodes
    )
    if None not in astuple(parallel):
        request.step()  # says what is wrong with it, where a search says only that nothing fits
    steps = [each.step for each in search(request)]
    fitting = [step for step in steps if sizes.vocab % step.layout.tp == 0]
    if not fitting:
        raise ConfigError(
            "parallel.tp does not divide the vocabulary, which Megatron-Bridge does not pad for a loaded model",
            found=f"tp {steps[0].layout.tp}, {sizes.vocab} tokens",
            remedy="leave parallel.tp out",
        )
    return fitting[0]
