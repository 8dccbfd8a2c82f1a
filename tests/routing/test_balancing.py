"""Losses, statistics and the bias update. Tolerance: float32 rounding, 1e-6."""

from __future__ import annotations

import math

import pytest
import torch
from routers import EXPERTS, router, routing, tokens
from torch.utils.checkpoint import checkpoint
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from upcycle.routing.config import RouterConfig, Schedule, coefficient

CLOSE = {"rtol": 1e-6, "atol": 1e-6}
TOP_K = 2


def slow_aux(logits_TN, experts_TK):
    """N * sum_i f_i p_i, expert by expert."""
    probability, loss = logits_TN.detach().double().softmax(-1), 0.0
    for e in range(EXPERTS):
        share = sum(row.count(e) for row in experts_TK.tolist()) / experts_TK.numel()
        loss += EXPERTS * share * float(probability[:, e].mean())
    return loss


def test_aux_loss_equals_a_slow_loop_and_transformers_over_k():
    made = router()
    logits, _, experts = made(tokens())
    loss = routing(made, aux_loss=1.0).losses(0).aux.detach()
    assert float(loss) == pytest.approx(slow_aux(logits, experts), rel=1e-6)
    torch.testing.assert_close(TOP_K * loss, load_balancing_loss_func((logits,), EXPERTS, TOP_K), **CLOSE)
    assert not torch.allclose(loss, load_balancing_loss_func((logits,), EXPERTS, TOP_K), **CLOSE)


def test_aux_loss_of_layers_does_not_cancel_as_transformers_does():
    a, b = router(), router()
    b.weight.data.copy_(-a.weight)
    b.weight.data = b.weight.data.roll(3, dims=0)
    logits = [made(tokens())[0] for made in (a, b)]
    ours = routing(a, b, aux_loss=1.0).losses(0).aux
    each = [load_balancing_loss_func((layer,), EXPERTS, TOP_K) / TOP_K for layer in logits]
    torch.testing.assert_close(ours, torch.stack(each).mean(), **CLOSE)
    assert load_balancing_loss_func(tuple(logits), EXPERTS, TOP_K) / TOP_K < ours


def test_aux_loss_is_one_for_uniform_routing_whatever_k():
    for top_k in (1, 2, 8):
        made = router(top_k=top_k)
        made.weight.data.zero_()
        made(tokens())
        assert routing(made).losses(0).aux.item() == pytest.approx(1.0)


def test_sigmoid_probabilities_are_shares():
    made = router(order="sigmoid_topk", renormalise=True)
    logits, _, experts = made(tokens())
    shares = logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)
    assert routing(made).losses(0).aux.item() == pytest.approx(slow_aux(shares.log(), experts), rel=1e-6)


def test_z_loss_and_weighted_total():
    a, b = router(seed=0), router(seed=1)
    logits = [made(tokens())[0] for made in (a, b)]
    both = routing(a, b, aux_loss=0.5, z_loss=Schedule(start=0.0, end=0.1, steps=10))
    losses = both.losses(5)
    expected = sum(math.log(sum(map(math.exp, row))) ** 2 for layer in logits for row in layer.tolist()) / 80
    assert losses.z.item() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(both.losses(5).total, 0.5 * losses.aux + 0.05 * losses.z, **CLOSE)
    assert not both.losses(0).z.requires_grad
    none = routing(a, b)
    assert not none.losses(0).total.requires_grad
    assert float(none.losses(0).total) == 0


@pytest.mark.parametrize(("step", "value"), [(0, 1.0), (5, 0.75), (10, 0.5), (99, 0.5)])
def test_coefficients_are_linear_and_then_constant(step, value):
    assert coefficient(Schedule(start=1.0, end=0.5, steps=10), step) == value
    assert coefficient(0.3, step) == 0.3


def test_gradient_goes_through_the_probabilities_only():
    made, x = router(), tokens().requires_grad_()
    logits, _, experts = made(x)
    loss = routing(made, aux_loss=1.0).losses(0).total
    share = experts.flatten().bincount(minlength=EXPERTS) / experts.numel()
    by_hand = EXPERTS * (share * logits.softmax(-1).mean(0)).sum()
    leaves = (made.weight, x)
    for ours, theirs in zip(
        torch.autograd.grad(loss, leaves, retain_graph=True), torch.autograd.grad(by_hand, leaves), strict=True
    ):
        torch.testing.assert_close(ours, theirs, **CLOSE)
        assert ours.any()


def test_global_batch_statistics_sum_over_the_micro_batches():
    first, second = tokens(30, seed=1), tokens(10, seed=2)
    whole = router()
    _, _, experts = whole(torch.cat([first, second]))
    share = experts.flatten().bincount(minlength=EXPERTS) / experts.numel()

    parts = router()
    accumulated = routing(parts, aux_loss=1.0, statistics="global_batch")
    parts(first)
    alone = accumulated.losses(0).total
    torch.testing.assert_close(alone, routing(parts).losses(0).aux, **CLOSE)
    logits, _, _ = parts(second)
    expected = EXPERTS * (share * logits.softmax(-1).mean(0)).sum()
    torch.testing.assert_close(accumulated.losses(0).total, expected, **CLOSE)
    assert not torch.allclose(routing(parts).losses(0).aux, expected, **CLOSE), "the mutant passed"
    (ours,), (theirs,) = (
        torch.autograd.grad(y, parts.weight, retain_graph=True) for y in (accumulated.losses(0).total, expected)
    )
    torch.testing.assert_close(ours, theirs, **CLOSE)

    accumulated.end_step(0)
    parts(second)
    torch.testing.assert_close(accumulated.losses(1).aux, routing(parts).losses(1).aux, **CLOSE)


def test_bias_update_equals_a_slow_loop():
    bias = torch.zeros(EXPERTS)
    made = router(bias=bias.clone())
    balanced = routing(made, bias_update=Schedule(start=0.1, end=0.0, steps=4))
    for step in range(6):
        loads = [0] * EXPERTS
        for micro in range(2):
            for row in made(tokens(seed=10 * step + micro))[2].tolist():
                for e in row:
                    loads[e] += 1
        balanced.end_step(step)
        for e in range(EXPERTS):
            sign = (sum(loads) / EXPERTS > loads[e]) - (sum(loads) / EXPERTS < loads[e])
            bias[e] += max(0.1 * (1 - step / 4), 0.0) * sign
        torch.testing.assert_close(made.e_score_correction_bias, bias, **CLOSE)
    assert bias.any()


@pytest.mark.parametrize("order", ["softmax_topk", "topk_softmax", "sigmoid_topk"])
def test_bias_evens_out_a_skewed_load(order):
    made = router(bias=torch.zeros(EXPERTS), order=order)
    x = tokens(400) + 0.7 * made.weight[:2].detach().sum(0)  # towards experts 0 and 1
    balanced, violations = routing(made, bias_update=Schedule(start=0.02, end=0.0, steps=400)), []
    for step in range(400):
        load = made(x)[2].flatten().bincount(minlength=EXPERTS)
        violations.append(float(load.max() / load.float().mean() - 1))
        balanced.end_step(step)
    assert violations[0] > 1.0
    assert violations[-1] < 0.1


def test_only_training_forwards_count():
    made = router(bias=torch.zeros(EXPERTS))
    both = routing(made, bias_update=0.1)
    made.eval()(tokens())
    both.end_step(0)
    assert not made.e_score_correction_bias.any()
    assert not both.statistics().tokens.any()
    with pytest.raises(RuntimeError, match="layer 0 saw no forward"):
        both.losses(0)


def test_statistics_are_sums_since_the_reset():
    a, b = router(RouterConfig(capacity_factor=0.5), seed=0), router(seed=1)
    both = routing(a, b)
    loads, entropy, mass = torch.zeros(2, EXPERTS, dtype=torch.int64), [0.0, 0.0], [0.0, 0.0]
    for seed in (1, 2):
        for layer, made in enumerate((a, b)):
            logits, _, experts = made(tokens(seed=seed))
            for row, chosen in zip(logits.double().softmax(-1).tolist(), experts.tolist(), strict=True):
                entropy[layer] -= sum(p * math.log(p) for p in row)
                mass[layer] += sum(row[e] for e in chosen)
                for e in chosen:
                    loads[layer, e] += 1
        both.end_step(0)
    sums = both.statistics()
    assert torch.equal(sums.load, loads)
    assert sums.tokens.tolist() == [80, 80]
    assert sums.dropped[0] > 0
    assert sums.dropped[1] == 0
    assert sums.entropy.tolist() == pytest.approx(entropy, rel=1e-5)
    assert sums.mass.tolist() == pytest.approx(mass, rel=1e-5)
    both.reset_statistics()
    assert not any(getattr(both.statistics(), name).any() for name in ("load", "tokens", "dropped", "entropy", "mass"))


def test_activation_checkpointing_counts_once_and_changes_no_gradient():
    def gradients(*, repeated: bool) -> tuple[torch.Tensor, ...]:
        made, x = router(RouterConfig(jitter=0.1, capacity_factor=1.0)), tokens().requires_grad_()
        both = routing(made, aux_loss=0.1, z_loss=0.1)
        torch.manual_seed(0)
        weights = checkpoint(lambda x: made(x)[1], x, use_reentrant=False) if repeated else made(x)[1]
        (weights.square().sum() + both.losses(0).total).backward()
        assert both.statistics().tokens.tolist() == [40]
        assert made.step_load_N.sum() == 40 * TOP_K
        return made.weight.grad, x.grad

    for ours, theirs in zip(gradients(repeated=True), gradients(repeated=False), strict=True):
        assert torch.equal(ours, theirs)


def test_deterministic_algorithms_are_enough():
    torch.use_deterministic_algorithms(True)
    try:
        for options in (
            RouterConfig(capacity_factor=1.0, jitter=0.1, noisy_top_k=True),
            RouterConfig(expert_choice=True),
        ):
            made = router(options)
            (made(tokens())[1].square().sum() + routing(made, z_loss=1.0).losses(0).total).backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert made.weight.grad.any()
