"""Virtual groups in training: rows that stay equal, positions that are always whole, what is measured of either."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from routers import EXPERTS, HIDDEN, router, routing, tokens

from upcycle.modeling.selection_upcycled_moe import ExpertSelection, select_experts
from upcycle.routing.config import Release, RouterConfig
from upcycle.routing.release import Joint, groups_at, joint
from upcycle.routing.statistics import whole_ffns
from upcycle.routing.ties import is_tied, shared_rows, tie

GRANULARITY, TOP_K = 2, 4
CLOSE = {"rtol": 1e-6, "atol": 1e-6}


def grouped(groups: str, *, order: str = "softmax_topk", options: RouterConfig | None = None, bias=None):
    made = router(options, top_k=TOP_K, granularity=GRANULARITY, groups=groups, order=order, bias=bias)
    return made, routing(made, aux_loss=0.1, z_loss=0.01, **({"bias_update": 0.05} if bias is not None else {}))


def steps(groups: str, count: int = 30, *, tied_after: bool = True) -> torch.Tensor:
    """A router's rows after steps of AdamW with weight decay and clipping towards random weights of experts."""
    made, both = grouped(groups)
    if not tied_after:
        both.end_step = lambda step: None
    optimizer = torch.optim.AdamW(made.parameters(), lr=0.05, weight_decay=0.1, fused=True)
    for step in range(count):
        _, weights, experts = made(tokens(seed=step))
        wanted = torch.randn(EXPERTS, generator=torch.Generator().manual_seed(step))
        ((weights * wanted[experts]).sum() + both.losses(step).total).backward()
        torch.nn.utils.clip_grad_norm_(made.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
        both.end_step(step)
    return made.weight.detach()


def test_tied_rows_stay_equal_bit_for_bit() -> None:
    tied = steps("tied")
    assert is_tied(tied, GRANULARITY)
    assert not torch.allclose(tied, router(top_k=TOP_K, granularity=GRANULARITY).weight)
    assert not is_tied(steps("free"), GRANULARITY), "the mutant passed"
    assert not is_tied(steps("whole"), GRANULARITY)


def test_a_group_trains_as_one_row_does() -> None:
    """The gradient of a shared row, a G-th of it for each copy; forward, the first row's bits."""
    rows = torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(0))
    for granularity in (2, 3, 7):
        weight = rows.repeat_interleave(granularity, dim=0).requires_grad_()
        shared = shared_rows(weight, granularity)
        assert torch.equal(shared, rows)
        direction = torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(1))
        (shared * direction).sum().backward()
        torch.testing.assert_close(
            weight.grad, (direction / granularity).repeat_interleave(granularity, dim=0), **CLOSE
        )


def test_rows_that_rounding_parted_are_tied_again() -> None:
    weight = torch.randn(EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(0))
    first = weight[::GRANULARITY].clone()
    assert not is_tied(weight, GRANULARITY)
    tie(weight, GRANULARITY)
    assert is_tied(weight, GRANULARITY)
    assert torch.equal(weight[::GRANULARITY], first)


@pytest.mark.parametrize("order", ["softmax_topk", "topk_softmax", "sigmoid_topk"])
def test_a_bias_keeps_groups_together(order: str) -> None:
    made, both = grouped("tied", order=order, bias=torch.zeros(EXPERTS))
    for step in range(5):
        made(tokens(seed=step))
        both.end_step(step)
    bias = made.e_score_correction_bias
    assert bias.any()
    assert torch.equal(bias[0::2], bias[1::2])


@pytest.mark.parametrize("order", ["softmax_topk", "topk_softmax", "sigmoid_topk"])
@pytest.mark.parametrize("biased", [False, True])
def test_by_position_every_token_gets_every_shard_whatever_the_rows(order: str, biased: bool) -> None:
    made, both = grouped("positions", order=order, bias=torch.linspace(-0.3, 0.3, EXPERTS) if biased else None)
    torch.nn.init.normal_(made.weight)
    _, weights, experts = made(tokens(200))
    assert whole_ffns(experts, GRANULARITY).all()
    assert all(len(set(row)) == TOP_K for row in experts.tolist())
    load = both.routers[0].sums.load
    assert load[0::2].sum() == load[1::2].sum() == 200 * TOP_K / GRANULARITY
    if order == "topk_softmax":
        torch.testing.assert_close(weights.sum(-1), torch.ones(200), **CLOSE)
        by_position = [(weights * (experts % GRANULARITY == g)).sum(-1) for g in range(GRANULARITY)]
        torch.testing.assert_close(by_position[0], by_position[1], **CLOSE)


def test_with_equal_rows_positions_are_whole_groups() -> None:
    """Weights, at the same size: today's scaling is exact for both."""
    for order in ("softmax_topk", "topk_softmax"):
        whole, by_position = (grouped(groups, order=order)[0](tokens()) for groups in ("whole", "positions"))
        dense = [torch.zeros(40, EXPERTS).scatter(1, made[2], made[1]) for made in (whole, by_position)]
        torch.testing.assert_close(*dense, **CLOSE)


def test_balancing_by_position() -> None:
    """Aux loss and z-loss are the means over positions of what each is alone."""
    made, both = grouped("positions")
    torch.nn.init.normal_(made.weight)
    logits, _, experts = made(tokens())
    losses = both.losses(0)
    aux, z = [], []
    for g in range(GRANULARITY):
        mine = logits[:, g::GRANULARITY]
        load = (experts[experts % GRANULARITY == g] // GRANULARITY).bincount(minlength=mine.shape[-1])
        aux.append(mine.shape[-1] * (load / load.sum() * mine.softmax(-1).mean(0)).sum())
        z.append(mine.logsumexp(-1).square().mean())
    torch.testing.assert_close(losses.aux, torch.stack(aux).mean(), **CLOSE)
    torch.testing.assert_close(losses.z, torch.stack(z).mean(), **CLOSE)
    free = grouped("free")[1]
    free.routers[0].weight.data.copy_(made.weight)
    free.routers[0](tokens())
    assert not torch.allclose(free.losses(0).aux, losses.aux, **CLOSE), "the mutant passed"


def test_noise_of_positions_is_each_experts_own() -> None:
    made, _ = grouped("positions", options=RouterConfig(noisy_top_k=True), order="topk_softmax")
    made.weight.data.zero_()
    _, _, experts = made(tokens(4000))
    groups = experts // GRANULARITY
    assert 0.2 < (groups[:, 0] == groups[:, 1]).float().mean() < 0.3  # one of four, by chance


def test_whole_ffns() -> None:
    experts = torch.tensor([[0, 1, 4, 5], [0, 5, 4, 1], [0, 2, 1, 3], [0, 2, 4, 1], [5, 0, 3, 1]])
    assert whole_ffns(experts, 2).tolist() == [True, True, True, False, False]
    assert whole_ffns(experts, 1).all()
    counted = torch.tensor([[True, True, True, False]]).expand(5, 4)
    assert whole_ffns(experts, 2, counted).tolist() == [False] * 5


def test_the_share_of_whole_ffns_is_counted() -> None:
    made, both = grouped("free")
    made(tokens())
    assert both.statistics().whole.tolist() == [40]
    torch.nn.init.normal_(made.weight)
    experts = made(tokens(seed=2))[2]
    assert both.statistics().whole.tolist() == [40 + int(whole_ffns(experts, GRANULARITY).sum())]
    assert both.statistics().whole < 80


class TestRelease:
    def test_a_joint_is_a_step_inside_of_the_run(self) -> None:
        at = [joint(Release(until=until, then="free"), steps=10).step for until in (0.001, 0.3, 0.999)]
        assert at == [1, 3, 9]
        options = RouterConfig(release=Release(until=0.3, then="free"))
        assert [groups_at(options, step=step, steps=10) for step in (0, 2, 3, 10)] == [None, None, "free", "free"]
        assert groups_at(RouterConfig(), step=10, steps=10) is None

    @pytest.mark.parametrize("then", ["free", "positions"])
    def test_the_sum_of_weights_does_not_jump(self, then: str) -> None:
        """The factor goes into the down projection; without it the experts' output would jump."""
        made, both = grouped("whole")
        torch.nn.init.normal_(made.weight, std=0.5)
        experts = torch.nn.Module()
        experts.down_proj = torch.nn.Parameter(torch.ones(EXPERTS, HIDDEN, 3))
        experts.up_proj = torch.nn.Parameter(torch.ones(EXPERTS, 3, HIDDEN))
        both._experts, both.joint = {0: experts}, Joint(step=2, then=then)
        both.begin(0)
        sums = []
        for step in range(3):
            _, weights, _ = made(tokens(seed=5))
            sums.append(weights.detach().sum().item())
            both.end_step(step)
            assert made.selection.groups == ("whole" if step == 0 else then)
        factor = experts.down_proj[0, 0, 0].item()
        assert factor == pytest.approx(sums[1] / sums[2], rel=1e-6)
        assert abs(factor - 1) > 0.01, "without it there would be no jump"
        assert torch.equal(experts.up_proj, torch.ones_like(experts.up_proj))

    def test_a_resumed_run_begins_where_it_is(self) -> None:
        made, both = grouped("whole")
        both.joint = Joint(step=2, then="free")
        for done, groups, ahead in ((0, "whole", False), (1, "whole", True), (2, "free", False), (9, "free", False)):
            made.selection = replace(made.selection, groups="whole")
            both.begin(done)
            assert (made.selection.groups, made.ahead is not None) == (groups, ahead)
            assert both.released(done) == (groups == "free")


def test_lossless_without_ties() -> None:
    """Experts that are shards of one FFN, by position and random rows: the FFN's output, to rounding."""
    generator = torch.Generator().manual_seed(0)
    up, down = torch.randn(12, HIDDEN, generator=generator), torch.randn(HIDDEN, 12, generator=generator)
    x = tokens()
    dense = torch.relu(x @ up.T) @ down.T
    shards = [(up[g::GRANULARITY], down[:, g::GRANULARITY] * GRANULARITY) for g in range(GRANULARITY)]
    outputs = torch.stack([torch.relu(x @ w.T) @ v.T for w, v in shards], dim=1)
    logits = torch.randn(40, EXPERTS, generator=generator)
    gaps = {}
    for groups in ("positions", "free"):
        selection = ExpertSelection(top_k=TOP_K, order="topk_softmax", granularity=GRANULARITY, groups=groups)
        weights, experts = select_experts(logits, selection)
        taken = outputs.gather(1, (experts % GRANULARITY)[..., None].expand(-1, -1, HIDDEN))
        gaps[groups] = float(((weights[..., None] * taken).sum(1) - dense).abs().max())
    assert gaps["positions"] < 1e-4
    assert gaps["free"] > 1, "the mutant passed"
