"""Fields of config.json that a MoE type does not have."""

from __future__ import annotations

import conversions
import models
import pytest

from upcycle.plan import unread


@pytest.mark.parametrize("order", conversions.ROUTER_ORDERS)
@pytest.mark.parametrize("name", models.MODELS)
def test_native_types_keep_what_every_family_says(name: str, order: str) -> None:
    plan = conversions.planned(conversions.described(name), router_order=order)
    assert not [text for text in (*plan.losses, *plan.notes) if "config.json" in text]


def test_a_field_that_the_family_knows_makes_the_start_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unread, "ANSWERED", unread.ANSWERED - {"pretraining_tp"})
    plan = conversions.planned(conversions.described("llama", pretraining_tp=2))
    assert plan.losses == ("qwen2_moe has no field for config.json's pretraining_tp=2",)


def test_a_field_that_no_model_reads_is_said() -> None:
    plan = conversions.planned(conversions.described("llama", logit_scale=2.0))
    assert not plan.losses
    assert "config.json's logit_scale=2.0 is not taken over: llama has no such field" in plan.notes
