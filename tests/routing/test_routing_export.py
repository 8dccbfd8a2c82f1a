"""What a checkpoint stores of its routing: `upcycled_moe` everything, native types what they have a field for."""

from __future__ import annotations

import pytest
import torch
from conversions import load, options, run
from models import token_ids
from routers import description
from transformers import AutoModelForCausalLM

from upcycle.errors import ConfigError
from upcycle.models.moe import describe_moe, regrouped
from upcycle.routing.config import BalanceConfig, RouterConfig, Schedule
from upcycle.routing.export import export_fields
from upcycle.routing.install import install_routers

SIGMOID = RouterConfig(score="sigmoid", scaling_factor=2.5)


def trained(directory, router, balance):
    """A model with routers that some steps of balancing have moved."""
    model, moe = load(directory), describe_moe(directory)
    routing = install_routers(model.train(), moe, router, balance)
    for step in range(3):
        model(token_ids())
        routing.end_step(step)
    return model.eval(), moe


def exported(model, moe, router, balance, directory):
    model.config.update(export_fields(moe, router, balance))
    model.save_pretrained(directory)
    return directory


def logits(model):
    with torch.no_grad():
        return model(token_ids()).logits


@pytest.fixture
def converted(dense, tmp_path):
    """An upcycled_moe E4G2T4 with routers far from uniform."""
    changes = {"target": "upcycled_moe", "top_k": 4, "router_std": 0.3, "groups": "whole"}
    return run(options(dense("llama"), tmp_path / "moe", **changes)).directory


def test_everything_survives_in_upcycled_moe(converted, tmp_path):
    balance = BalanceConfig(bias_update=0.05)
    model, moe = trained(converted, SIGMOID, balance)
    directory = exported(model, moe, SIGMOID, balance, tmp_path / "exported")
    loaded = load(directory)
    assert torch.equal(logits(loaded), logits(model))
    gate = loaded.moe_blocks[0].gate
    assert gate.e_score_correction_bias.any()
    bias = gate.e_score_correction_bias.clone()
    gate.e_score_correction_bias.zero_()
    assert not torch.allclose(logits(loaded), logits(model)), "the mutant passed"

    for half in (AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16), load(directory).bfloat16()):
        assert half.moe_blocks[0].gate.weight.dtype == torch.bfloat16
        assert torch.equal(half.moe_blocks[0].gate.e_score_correction_bias, bias)

    again = load(directory)
    install_routers(again, describe_moe(directory), RouterConfig(), BalanceConfig())
    assert torch.equal(logits(again), logits(model))


def test_a_bias_that_the_checkpoint_lacks_is_zero(converted):
    model = AutoModelForCausalLM.from_pretrained(converted, router_correction_bias=True)
    for block in model.moe_blocks:
        assert torch.equal(block.gate.e_score_correction_bias, torch.zeros(8))


def test_expert_choice_of_a_checkpoint_with_a_bias_is_refused(converted):
    model = AutoModelForCausalLM.from_pretrained(converted, router_correction_bias=True)
    moe = regrouped(describe_moe(converted), "free")
    with pytest.raises(ConfigError, match="score plus a bias"):
        install_routers(model, moe, RouterConfig(expert_choice=True), BalanceConfig())


@pytest.mark.parametrize("order", ["softmax_topk", "topk_softmax"])
@pytest.mark.parametrize("target", ["qwen2_moe", "upcycled_moe"])
def test_another_order_survives(target, order, dense, tmp_path):
    source = run(options(dense("llama"), tmp_path / "moe", target=target, router_std=0.3)).directory
    router, balance = RouterConfig(order=order, capacity_factor=1.0), BalanceConfig(aux_loss=0.01)
    model, moe = trained(source, router, balance)
    loaded = load(exported(model, moe, router, balance, tmp_path / "exported"))
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.config.router_aux_loss_coef == 0.005


@pytest.mark.parametrize(
    ("model_type", "moe", "router", "balance", "fields"),
    [
        ("mixtral", {}, {}, {}, {}),
        ("mixtral", {"router_order": "topk_softmax"}, {"order": "topk_softmax"}, {}, {}),
        ("qwen3_moe", {}, {"order": "topk_softmax", "scaling_factor": 1.0}, {}, {"norm_topk_prob": True}),
        ("olmoe", {}, {"order": "softmax_topk", "jitter": 0.1}, {}, {"norm_topk_prob": False}),
        ("flex_olmo", {}, {"score": "softmax", "noisy_top_k": True}, {"z_loss": 0.1}, {}),
        ("upcycled_moe", {}, {}, {}, {}),
        (
            "upcycled_moe",
            {},
            {"order": "topk_softmax"},
            {},
            {"router_order": "topk_softmax", "router_renormalise": False},
        ),
        ("upcycled_moe", {}, {"score": "sigmoid"}, {}, {"router_order": "sigmoid_topk", "router_renormalise": True}),
        ("upcycled_moe", {"router_order": "sigmoid_topk"}, {"score": "sigmoid"}, {}, {}),
        ("upcycled_moe", {"router_order": "sigmoid_topk"}, {"renormalise": False}, {}, {"router_renormalise": False}),
        (
            "upcycled_moe",
            {"groups": "whole"},
            {"scaling_factor": 2.0},
            {"bias_update": 0.1},
            {"routed_scaling_factor": 2.0, "router_correction_bias": True},
        ),
    ],
)
def test_fields(model_type, moe, router, balance, fields):
    found = export_fields(description(model_type, **moe), RouterConfig(**router), BalanceConfig(**balance))
    stored = {"groups": moe.get("groups", "free")} if model_type == "upcycled_moe" else {}
    assert found == {**fields, **stored, "router_aux_loss_coef": 0.0}


def test_the_last_coefficient_is_stored_over_k():
    balance = BalanceConfig(aux_loss=Schedule(start=1.0, end=0.2, steps=10))
    assert export_fields(description(), RouterConfig(), balance)["router_aux_loss_coef"] == 0.05


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "qwen3_moe", "flex_olmo", "olmoe", "granitemoeshared"])
@pytest.mark.parametrize(
    ("router", "balance", "message"),
    [
        ({"score": "sigmoid"}, {}, "router.score=sigmoid cannot be stored in {type}(.|\n)*target=upcycled_moe"),
        ({"scaling_factor": 2.0}, {}, "router.scaling_factor=2.0 cannot be stored in {type}"),
        ({}, {"bias_update": 0.1}, "balance.bias_update=0.1 cannot be stored in {type}"),
        ({"expert_choice": True}, {}, "router.expert_choice=true cannot be stored in any type"),
    ],
)
def test_refused_by_native_types(model_type, router, balance, message):
    with pytest.raises(ConfigError, match=message.format(type=model_type)):
        export_fields(description(model_type), RouterConfig(**router), BalanceConfig(**balance))


@pytest.mark.parametrize("groups", ["whole", "positions"])
def test_native_types_refuse_what_is_no_plain_top_k(groups):
    with pytest.raises(ConfigError, match=f"moe.groups={groups} cannot be stored in mixtral(.|\n)*moe.groups=tied"):
        export_fields(description("mixtral", groups=groups), RouterConfig(), BalanceConfig())
    assert "groups" not in export_fields(description("mixtral", groups="tied"), RouterConfig(), BalanceConfig())


@pytest.mark.parametrize("model_type", ["mixtral", "granitemoeshared"])
def test_types_without_a_flag_refuse_the_other_order(model_type):
    with pytest.raises(ConfigError, match=f"router.order=softmax_topk cannot be stored in {model_type}"):
        export_fields(description(model_type), RouterConfig(order="softmax_topk"), BalanceConfig())


def test_expert_choice_is_stored_nowhere():
    with pytest.raises(ConfigError, match="not causal"):
        export_fields(description(), RouterConfig(expert_choice=True), BalanceConfig())
