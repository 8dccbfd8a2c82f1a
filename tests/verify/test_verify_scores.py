"""`upcycle verify` of reward models: scores at every position, what it passes, and what it must not."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import conversions
import models
import pytest
import rewards

from upcycle.data.bytes_tokenizer import byte_tokenizer
from upcycle.errors import SourceError
from upcycle.options.config import VerifyConfig
from upcycle.verify.report import report_table
from upcycle.verify.run import verify

if TYPE_CHECKING:
    from pathlib import Path

pytest_plugins = ("text_model", "tiny")


def options(source: Path, moe: Path) -> VerifyConfig:
    return VerifyConfig(
        source=str(source), moe=str(moe), text=None, tokens=128, sequence_length=32, tolerance=1e-3, format="json"
    )


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = models.save(rewards.build("llama", vocab_size=257), tmp_path_factory.mktemp("reward") / "llama")
    byte_tokenizer().save_pretrained(directory)
    return directory


@pytest.mark.parametrize(("order", "error"), [("topk_softmax", 1e-6), ("softmax_topk", 3e-4)])
def test_scores_are_compared(order: str, error: float, reward: Path, tmp_path: Path) -> None:
    moe = conversions.run(conversions.options(reward, tmp_path / "moe", router_order=order)).directory
    report = verify(options(reward, moe))
    assert report["passed"]
    assert 0 < report["score_rms_error"] <= report["score_max_error"]
    assert report["score_rms_error"] < error * report["score_rms"]
    assert report["score_gap"] == pytest.approx((report["score_rms_error"] / report["score_rms"]) ** 2)
    assert "dense_loss" not in report
    assert report_table(report)


def test_a_spoilt_expert_is_not_equivalent(reward: Path, tmp_path: Path) -> None:
    moe = conversions.run(conversions.options(reward, tmp_path / "moe", router_order="topk_softmax")).directory
    name = next(name for name in conversions.read_tensors(moe) if name.endswith("experts.0.w2.weight"))
    conversions.edit(moe, lambda tensors: tensors[name].mul_(2))
    report = verify(options(reward, moe))
    assert not report["passed"]
    assert report["score_gap"] > 1e-3


def test_another_head_is_refused(reward: Path, text_model: Path, tmp_path: Path) -> None:
    source = shutil.copytree(reward, tmp_path / "reward")
    moe = conversions.run(conversions.options(source, tmp_path / "moe")).directory
    language = models.save(models.build("llama", vocab_size=257), tmp_path / "lm")
    byte_tokenizer().save_pretrained(language)
    with pytest.raises(SourceError, match="different heads"):
        verify(options(language, moe))
