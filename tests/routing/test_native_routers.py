"""Our router in place of every type's own one: the same bits in float32, the same parameters, the same checkpoint."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conversions import load, options, read_tensors, run
from models import HIDDEN, token_ids

from upcycle.models.config import load_config
from upcycle.models.moe import describe_moe, regrouped
from upcycle.routing.config import BalanceConfig, RouterConfig
from upcycle.routing.install import install_routers

# Model of the table, MoE type, order of softmax and top-k; every type in every order that it has.
TYPES = [
    ("mistral", "mixtral", "topk_softmax"),
    ("llama", "qwen2_moe", "softmax_topk"),
    ("llama", "qwen2_moe", "topk_softmax"),
    ("qwen3", "qwen3_moe", "softmax_topk"),
    ("qwen3", "qwen3_moe", "topk_softmax"),
    ("olmo2", "flex_olmo", "softmax_topk"),
    ("olmo2", "flex_olmo", "topk_softmax"),
    ("qwen3_one_head", "olmoe", "softmax_topk"),
    ("qwen3_one_head", "olmoe", "topk_softmax"),
    ("llama_attention_bias", "granitemoeshared", "topk_softmax"),
    ("gpt2", "upcycled_moe", "softmax_topk"),
    ("gpt2", "upcycled_moe", "topk_softmax"),
]
DEFAULTS = (RouterConfig(), BalanceConfig())


def x_TH() -> torch.Tensor:
    return torch.randn(50, HIDDEN, generator=torch.Generator().manual_seed(3))


def same(ours: tuple[torch.Tensor, ...], theirs: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def mutant(selection):
    """Weights that sum to 1 where they should not, or the other way round."""
    sum_to_one = selection.renormalise or selection.order == "topk_softmax"
    return replace(selection, order="softmax_topk", renormalise=not sum_to_one)


@pytest.fixture(scope="module", params=TYPES, ids="-".join)
def converted(request, dense, tmp_path_factory):
    """A converted E4G2T2, and its routers large enough to be far from uniform."""
    name, target, order = request.param
    output = tmp_path_factory.mktemp("converted") / "moe"
    return run(options(dense(name), output, target=target, router_order=order, router_std=0.3, groups="free")).directory


def test_router_is_the_native_one_bit_for_bit(converted):
    model, moe = load(converted), describe_moe(converted)
    with torch.no_grad():
        native = {layer: model.get_submodule(moe.router_path(layer))(x_TH()) for layer in moe.layers}
        logits, before = model(token_ids()).logits, dict(model.named_parameters())
        routing = install_routers(model, moe, *DEFAULTS)
        assert list(routing.routers) == list(moe.layers)
        for layer, router in routing.routers.items():
            assert model.get_submodule(moe.router_path(layer)) is router
            for ours in (router(x_TH()), router.train()(x_TH()), router.eval()(x_TH().view(5, 10, HIDDEN))):
                assert same(ours, native[layer])
            groups = moe.chosen(ours).sort(dim=-1).values
            assert torch.equal(groups[:, 1], groups[:, 0] + 1)
            assert not (groups[:, 0] % 2).any()
            router.selection, right = mutant(router.selection), router.selection
            assert not torch.allclose(router(x_TH())[1], native[layer][1], rtol=0.01), "the mutant passed"
            router.selection = right
        assert torch.equal(model(token_ids()).logits, logits)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)


def test_tied_rows_choose_what_plain_top_k_does(converted):
    """In another order within a group, whose logits tie."""
    model, moe = load(converted), regrouped(describe_moe(converted), "tied")
    with torch.no_grad():
        native = {layer: model.get_submodule(moe.router_path(layer))(x_TH()) for layer in moe.layers}
        logits = model(token_ids()).logits
        routing = install_routers(model, moe, *DEFAULTS)
        for layer, router in routing.routers.items():
            scores, weights, experts = router(x_TH())
            assert torch.equal(scores, native[layer][0])
            assert torch.equal(experts.sort(dim=-1).values, native[layer][2].sort(dim=-1).values)
            assert torch.equal(weights, native[layer][1])
        torch.testing.assert_close(model(token_ids()).logits, logits, rtol=1e-5, atol=1e-5)


def test_what_is_saved_is_the_same_checkpoint(converted, tmp_path):
    model = load(converted)
    install_routers(model, describe_moe(converted), *DEFAULTS)
    model.save_pretrained(tmp_path)
    before, after = read_tensors(converted), read_tensors(tmp_path)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    load(tmp_path)


def test_float32_whatever_the_dtype(converted):
    model, moe = load(converted, dtype=torch.bfloat16), describe_moe(converted)
    routing = install_routers(model, moe, *DEFAULTS)
    router, x = routing.routers[moe.layers[0]], x_TH().bfloat16()
    logits, weights, _ = router(x)
    assert (logits.dtype, weights.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(logits, x.float() @ router.weight.float().T, rtol=1e-6, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same(router(x), router(x))
        assert torch.equal(router(x)[0], logits)


@pytest.mark.parametrize("order", ["softmax_topk", "topk_softmax"])
def test_another_order_is_what_the_type_itself_does_in_that_order(order, dense, tmp_path):
    for target, flag in {"qwen2_moe": "norm_topk_prob", "upcycled_moe": "router_order"}.items():
        directory = run(options(dense("llama"), tmp_path / target, target=target, router_std=0.3)).directory
        config = load_config(directory)
        setattr(config, flag, order if target == "upcycled_moe" else order == "topk_softmax")
        with torch.no_grad():
            expected = load(directory, config=config)(token_ids()).logits
            model = load(directory)
            install_routers(model, describe_moe(directory), RouterConfig(order=order), BalanceConfig())
            assert torch.equal(model(token_ids()).logits, expected)


def test_transformers_own_balancing_loss_is_off(dense, tmp_path):
    directory = run(options(dense("llama"), tmp_path / "moe", target="qwen2_moe")).directory
    model = load(directory, output_router_logits=True)
    routing = install_routers(model, describe_moe(directory), RouterConfig(), BalanceConfig(aux_loss=0.1))
    output = model.train()(token_ids(), labels=token_ids())
    assert output.router_logits is None
    assert routing.losses(0).total > 0
