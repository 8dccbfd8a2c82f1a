"""Every option of the router against slow loops over tokens and experts. Tolerance: float32 rounding, 1e-6."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from routers import EXPERTS, HIDDEN, router, tokens

from upcycle.modeling.selection_upcycled_moe import ExpertSelection, select_experts
from upcycle.routing.config import RouterConfig

CLOSE = {"rtol": 1e-6, "atol": 1e-6}
BIAS = torch.tensor([0.3, -0.2, 0.0, 0.1, -0.4, 0.2, 0.0, -0.1])
OPTIONS = {
    "default": {},
    "topk_softmax": {"order": "topk_softmax"},
    "renormalised": {"renormalise": True},
    "scaled": {"scaling_factor": 2.5},
    "sigmoid": {"order": "sigmoid_topk", "renormalise": True, "scaling_factor": 2.5},
    "sigmoid_plain": {"order": "sigmoid_topk"},
    "bias": {"bias": BIAS},
    "bias_sigmoid": {"order": "sigmoid_topk", "renormalise": True, "bias": BIAS},
    "bias_topk_softmax": {"order": "topk_softmax", "bias": BIAS},
    "capacity": {"options": RouterConfig(capacity_factor=0.7)},
    "jitter": {"options": RouterConfig(jitter=0.1)},
    "noise": {"options": RouterConfig(noisy_top_k=True)},
    "expert_choice": {"options": RouterConfig(expert_choice=True)},
    "whole": {"granularity": 2, "groups": "whole", "top_k": 4},
    "tied": {"granularity": 2, "groups": "tied", "top_k": 4},
    "positions": {"granularity": 2, "groups": "positions", "top_k": 4},
    "positions_topk_softmax": {"granularity": 2, "groups": "positions", "top_k": 4, "order": "topk_softmax"},
    "positions_noise": {
        "granularity": 2,
        "groups": "positions",
        "top_k": 4,
        "options": RouterConfig(noisy_top_k=True, capacity_factor=0.7),
    },
}


def slow_scores(logits: list[float], selection: ExpertSelection) -> list[float]:
    if selection.order == "sigmoid_topk":
        return [1 / (1 + math.exp(-z)) for z in logits]
    apart = selection.granularity if selection.groups == "positions" else 1
    totals = [sum(math.exp(z) for z in logits[start::apart]) for start in range(apart)]
    return [math.exp(z) / totals[e % apart] / apart for e, z in enumerate(logits)]


def slow_choice(choice: list[float], selection: ExpertSelection) -> list[int]:
    size, rounds = selection.granularity, selection.top_k // selection.granularity
    if selection.groups == "free":
        return sorted(range(len(choice)), key=lambda e: -choice[e])[: selection.top_k]
    if selection.groups == "positions":
        best = [sorted(range(g, len(choice), size), key=lambda e: -choice[e])[:rounds] for g in range(size)]
        return [position[r] for r in range(rounds) for position in best]
    groups = [list(range(start, start + size)) for start in range(0, len(choice), size)]
    groups.sort(key=lambda group: -sum(choice[e] for e in group))
    return [e for group in groups[:rounds] for e in group]


def slow_selection(logits_TN, selection, bias=None):
    """One token after the other, in double precision."""
    all_weights, all_experts = [], []
    apart = selection.granularity if selection.groups == "positions" else 1
    for logits in logits_TN.double().tolist():
        scores = slow_scores(logits, selection)
        choice = [
            s + b for s, b in zip(scores, bias.tolist() if bias is not None else [0.0] * len(scores), strict=True)
        ]
        experts = slow_choice(choice, selection)
        weights = [scores[e] for e in experts]
        if selection.order == "topk_softmax" or selection.renormalise:
            sums = [sum(w for w, e in zip(weights, experts, strict=True) if e % apart == g) for g in range(apart)]
            weights = [w / sums[e % apart] / apart for w, e in zip(weights, experts, strict=True)]
        all_weights.append([w * selection.scaling_factor for w in weights])
        all_experts.append(experts)
    return torch.tensor(all_weights), torch.tensor(all_experts)


@pytest.mark.parametrize("bias", [None, BIAS])
@pytest.mark.parametrize("groups", ["free", "tied", "whole", "positions"])
@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("order", ["softmax_topk", "topk_softmax", "sigmoid_topk"])
def test_selection_equals_a_slow_loop(order, renormalise, groups, bias):
    logits = torch.randn(50, EXPERTS, generator=torch.Generator().manual_seed(0))
    selection = ExpertSelection(
        top_k=4, order=order, renormalise=renormalise, scaling_factor=1.5, granularity=2, groups=groups
    )
    weights, experts = select_experts(logits, selection, bias)
    slow_weights, slow_experts = slow_selection(logits, selection, bias)
    assert torch.equal(experts, slow_experts)
    torch.testing.assert_close(weights, slow_weights, **CLOSE)
    # Mutants: the bias weighs too; the factor is forgotten; groups are not looked at.
    if bias is not None:
        assert not torch.allclose(select_experts(logits + bias, selection)[0], slow_weights, **CLOSE)
    assert not torch.allclose(weights / 1.5, slow_weights, **CLOSE)
    if groups != "free":
        assert not torch.equal(select_experts(logits, replace(selection, groups="free"), bias)[1], slow_experts)


@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_reach_the_router_and_its_input(name):
    made, x = router(**OPTIONS[name]), tokens().requires_grad_()
    torch.manual_seed(0)
    _, weights, _ = made(x)
    direction = torch.randn(weights.shape, generator=torch.Generator().manual_seed(2))
    for gradient in torch.autograd.grad((weights * direction).sum(), (made.weight, x)):
        assert gradient.isfinite().all()
        assert gradient.any()


@pytest.mark.parametrize("name", OPTIONS)
def test_evaluation_has_no_noise_and_drops_nothing(name):
    made, x = router(**OPTIONS[name]).eval(), tokens()
    plain = router(**{key: value for key, value in OPTIONS[name].items() if key != "options"}).eval()
    if name == "expert_choice":
        assert all(torch.equal(a, b) for a, b in zip(made(x), made.train()(x), strict=True))
    else:
        assert all(torch.equal(a, b) for a, b in zip(made(x), plain(x), strict=True))
    assert made.eval().sums is None or name == "expert_choice"


def slow_capacity(probability_TN, experts_TK, limit):
    """Every expert takes its tokens from the most probable down; the earlier of two equal ones first."""
    kept = torch.zeros_like(experts_TK, dtype=torch.bool)
    for e in range(EXPERTS):
        pairs = [(t, k) for t, k in product(*map(range, experts_TK.shape)) if experts_TK[t, k] == e]
        for t, k in sorted(pairs, key=lambda pair: -float(probability_TN[pair[0], e]))[:limit]:
            kept[t, k] = True
    return kept


@pytest.mark.parametrize("factor", [0.01, 0.5, 1.0, 1.3, 100.0])
@pytest.mark.parametrize("order", ["softmax_topk", "topk_softmax", "sigmoid_topk"])
def test_capacity_equals_a_slow_loop(factor, order):
    made, x = router(RouterConfig(capacity_factor=factor), order=order), tokens()
    logits, weights, experts = made(x)
    free = router(order=order)(x)
    logits = logits.detach()
    scores = logits.sigmoid() if order == "sigmoid_topk" else logits.softmax(-1)
    limit = math.ceil(factor * 40 * 2 / EXPERTS)
    kept = slow_capacity(scores, experts, limit)
    assert torch.equal(experts, free[2])
    assert torch.equal(weights, free[1] * kept)
    assert int(made.sums.dropped) == int((~kept).sum())
    assert torch.equal(made.sums.load, experts.flatten().bincount(minlength=EXPERTS))
    assert not kept.all() or factor == 100.0
    if factor == 1.0:
        assert not torch.equal(weights, free[1] * slow_capacity(-scores, experts, limit)), "the mutant passed"


def test_equal_tokens_are_dropped_from_the_end():
    made = router(RouterConfig(capacity_factor=0.5))
    weights = made(tokens(1).expand(40, HIDDEN))[1]
    assert torch.equal((weights > 0).all(-1), torch.arange(40) < 5)


def test_jitter_multiplies_the_input():
    made = router(RouterConfig(jitter=0.1))
    x = torch.eye(HIDDEN).repeat(30, 1)  # one entry each, so a logit is a weight times that entry's factor
    with torch.no_grad():
        factors = made(x)[0] / made.eval()(x)[0]
    torch.testing.assert_close(factors, factors[:, :1].expand_as(factors), rtol=1e-5, atol=0)
    assert factors.min() >= 0.9 - 1e-6
    assert factors.max() <= 1.1 + 1e-6
    assert float(factors.std()) == pytest.approx(0.2 / 12**0.5, rel=0.1)


def test_noise_has_standard_deviation_one_over_the_experts():
    made = router(RouterConfig(noisy_top_k=True), order="topk_softmax", top_k=EXPERTS)
    made.weight.data.zero_()
    logits, weights, experts = made(tokens(4000))
    assert not logits.any(), "the returned logits have noise"
    noise = weights.detach().log().gather(-1, experts.argsort(-1))
    assert float((noise[:, 0] - noise[:, 1]).std()) == pytest.approx(2**0.5 / EXPERTS, rel=0.05)


@pytest.mark.parametrize("name", ["noise", "jitter", "capacity", "expert_choice"])
def test_virtual_groups_stay_whole(name):
    for order in ("softmax_topk", "topk_softmax"):
        _, weights, experts = router(**OPTIONS[name], granularity=2, order=order)(tokens())
        by_expert = torch.zeros(40, EXPERTS).scatter_add(1, experts, weights)
        torch.testing.assert_close(by_expert[:, 0::2], by_expert[:, 1::2], **CLOSE)


def slow_expert_choice(scores_TN, limit):
    weights = torch.zeros_like(scores_TN)
    for e in range(EXPERTS):
        for t in sorted(range(len(scores_TN)), key=lambda t: -float(scores_TN[t, e]))[:limit]:
            weights[t, e] = scores_TN[t, e]
    return weights


@pytest.mark.parametrize("factor", [None, 0.3, 2.0, 100.0])
@pytest.mark.parametrize("order", ["softmax_topk", "topk_softmax", "sigmoid_topk"])
def test_expert_choice_equals_a_slow_loop(factor, order):
    made = router(RouterConfig(expert_choice=True, capacity_factor=factor), order=order, scaling_factor=1.5)
    logits, weights, experts = made(tokens())
    logits = logits.detach()
    scores = logits.sigmoid() if order == "sigmoid_topk" else logits.softmax(-1)
    limit = min(40, math.ceil((factor or 1.0) * 40 * 2 / EXPERTS))
    expected = slow_expert_choice(scores, limit)
    chosen = expected > 0
    if order == "topk_softmax":
        expected = expected / expected.sum(-1, keepdim=True).clamp(min=1e-9)
    torch.testing.assert_close(torch.zeros(40, EXPERTS).scatter(1, experts, weights), expected * 1.5, **CLOSE)
    assert weights.shape[1] == chosen.sum(-1).max()
    assert all(len(set(row)) == len(row) for row in experts.tolist())
    assert torch.equal(made.sums.load, torch.full((EXPERTS,), limit))
    assert int(made.sums.dropped) == 0


def test_expert_choice_of_no_tokens():
    _, weights, experts = router(RouterConfig(expert_choice=True)).eval()(tokens(0))
    assert weights.shape == experts.shape == (0, 1)


def test_the_bias_stays_in_float32():
    made = router(bias=BIAS / 3).bfloat16()
    assert made.weight.dtype == torch.bfloat16
    assert torch.equal(made.e_score_correction_bias, BIAS / 3)
