"""What depends on the version of transformers: layouts of ranks, and the order in which a router returns things."""

from __future__ import annotations

from typing import TYPE_CHECKING

import conversions
import pytest
import torch
from models import HIDDEN

from upcycle.distributed.model import laid_out
from upcycle.errors import ConfigError
from upcycle.models.config import load_config
from upcycle.models.moe import describe_moe
from upcycle.models.transformers_version import LAYS_OUT, installed
from upcycle.parallel.rank_layout import RankLayout
from upcycle.routing.config import BalanceConfig, RouterConfig
from upcycle.routing.install import install_routers

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def test_installed() -> None:
    assert (5, 17) <= installed() < (6, 0)


def test_several_ranks_need_a_transformers_that_lays_models_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("upcycle.distributed.model.installed", lambda: (LAYS_OUT[0], LAYS_OUT[1] - 1))
    with laid_out(RankLayout()) as arguments:
        assert arguments == {}
    with (
        pytest.raises(ConfigError, match=r"needs a newer transformers[\s\S]*pip install 'transformers>=5.23'"),
        laid_out(RankLayout(fsdp=2)),
    ):
        pass


@pytest.mark.parametrize(("version", "first"), [((5, 17), True), ((5, 20), True), ((5, 21), False), ((6, 0), False)])
def test_our_router_returns_things_in_the_order_of_the_native_one(
    version: tuple[int, int],
    first: bool,
    dense: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    request = conversions.options(
        dense("llama_attention_bias"), tmp_path / "moe", target="granitemoeshared", router_order="topk_softmax"
    )
    directory = conversions.run(request).directory
    monkeypatch.setattr("upcycle.models.moe.installed", lambda: version)
    moe, model = describe_moe(directory), conversions.load(directory)
    assert moe.indices_first is first
    routers = install_routers(model, moe, RouterConfig(), BalanceConfig()).routers
    x_TH = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(0))
    output = routers[0].eval()(x_TH)
    index_TK = moe.chosen(output)
    assert index_TK.dtype == torch.int64
    assert index_TK.shape == (5, load_config(directory).num_experts_per_tok)
    assert output[2 if first else 0].shape == (5, moe.experts)
