"""Routers of one layer, and what the tests compare them with. H = 16 hidden, N = 8 experts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from upcycle.arch.targets import TARGETS
from upcycle.modeling.selection_upcycled_moe import ExpertSelection
from upcycle.routing.config import BalanceConfig, RouterConfig
from upcycle.routing.install import Routing
from upcycle.routing.router import Router

HIDDEN, EXPERTS = 16, 8


def tokens(count: int = 40, *, seed: int = 1) -> Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed))


def router(
    options: RouterConfig | None = None,
    *,
    top_k: int = 2,
    granularity: int = 1,
    bias: Tensor | None = None,
    seed: int = 0,
    passes: int = 1,
    **selection: Any,
) -> Router:
    """A router in training mode whose rows are equal within a virtual group."""
    rows = torch.randn(EXPERTS // granularity, HIDDEN, generator=torch.Generator().manual_seed(seed)) / 2
    native = nn.Linear(HIDDEN, EXPERTS, bias=False)
    native.weight = nn.Parameter(rows.repeat_interleave(granularity, dim=0))
    chosen = ExpertSelection(top_k=top_k, granularity=granularity, **{"order": "softmax_topk"} | selection)
    return Router(native, chosen, options or RouterConfig(), bias_N=bias, passes=passes).train()


def routing(*routers: Router, **balance: Any) -> Routing:
    return Routing(dict(enumerate(routers)), BalanceConfig(**balance))


def description(model_type: str = "upcycled_moe", **changes: Any) -> Any:
    """What the options are checked against; a MoeDescription has more fields, which nothing here reads."""
    sizes = {"experts": 8, "top_k": 4, "granularity": 2, "router_order": "softmax_topk", "groups": "free"}
    sizes["limits"] = (1, 1)
    return SimpleNamespace(target=TARGETS[model_type], model_type=model_type, **sizes | changes)
