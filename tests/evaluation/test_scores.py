"""Correlations by hand, and `upcycle evaluate` of reward models: what it prints, writes and refuses."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import conversions
import models
import numpy as np
import pytest
import rewards
import torch

from upcycle.data.bytes_tokenizer import byte_tokenizer
from upcycle.data.rated import MASK
from upcycle.data.rated_corpus import RatedRows
from upcycle.evaluation.scores import attribute_metrics, correlation, held_out_scores, ranked, row_errors

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from cli import Outcome

pytest_plugins = ("tiny",)


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = models.save(rewards.build("llama", vocab_size=257), tmp_path_factory.mktemp("reward") / "llama")
    byte_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    file = rewards.rated(tmp_path / "ratings.jsonl")
    return [f"data.files='{file}'", f"data.attributes=[{','.join(rewards.ATTRIBUTES)}]", "data.held_out=12"]


def test_correlations() -> None:
    one, other = np.array([1.0, 2.0, 3.0, 5.0]), np.array([2.0, 1.0, 4.0, 3.0])
    assert correlation(one, other) == pytest.approx(np.corrcoef(one, other)[0, 1])
    assert correlation(one, 3 - 2 * one) == pytest.approx(-1)
    assert correlation(one, np.full(4, 2.0)) is None
    assert correlation(one, np.array([1.0, np.nan, 2.0, 3.0])) is None
    assert ranked(np.array([3.0, 1.0, 3.0, 7.0])).tolist() == [1.5, 0.0, 1.5, 3.0]
    # Spearman's rho without ties is 1 - 6 sum d^2 / (n (n^2 - 1)): here d = -1, 1, -1, 1.
    assert correlation(ranked(one), ranked(other)) == pytest.approx(1 - 6 * 4 / (4 * 15))


def test_masked_labels_do_not_count() -> None:
    scores = np.array([[1.0, 9.0, 0.0], [2.0, 1.0, 0.0], [4.0, 2.0, 0.0]])
    labels = np.array([[1.0, MASK, MASK], [3.0, 1.0, MASK], [3.0, 4.0, MASK]])
    found = attribute_metrics(scores, labels, ("a", "b", "c"))
    assert set(found) == {"a", "b"}
    assert found["a"]["mse"] == pytest.approx(2 / 3)
    assert found["b"] == {"pearson": pytest.approx(1), "spearman": pytest.approx(1), "mse": 2.0}
    assert row_errors(scores, labels).tolist() == [0.0, 0.5, 2.5]


def test_scores_of_a_batch_are_those_of_each_row(reward: Path) -> None:
    from upcycle.models.load import load_checkpoint

    model = load_checkpoint(reward)
    ids = [np.arange(4, 4 + size) for size in (3, 9, 5, 1, 7)]
    rows = RatedRows(ids, torch.zeros(5, 3), sequence_length=10, padding=3)
    scores, _ = held_out_scores(model, rows, batch_size=2, rows=None)
    with torch.no_grad():
        alone = [model(input_ids=torch.from_numpy(each)[None]).logits[0].numpy() for each in ids]
    np.testing.assert_allclose(scores, np.stack(alone), atol=2e-6)
    assert len(held_out_scores(model, rows, batch_size=2, rows=3)[0]) == 3


def test_the_command(reward: Path, data: list[str], upcycle: Callable[..., Outcome], tmp_path: Path) -> None:
    """A MoE measures as the dense model; and one whose expert is spoilt does not."""
    moe = conversions.run(conversions.options(reward, tmp_path / "moe", router_order="topk_softmax")).directory
    found = []
    for model in (reward, moe):
        output = tmp_path / f"{model.name}.json"
        ended = upcycle("evaluate", f"model={model}", "data=attributes", *data, f"output={output}")
        assert ended.status == 0, ended.err
        for shown in ("Pearson", "Spearman", "12 held-out rows", "verbosity"):
            assert shown in " ".join(ended.out.split())
        found.append(json.loads(output.read_text()))
    assert set(found[0]["attributes"]) == set(rewards.ATTRIBUTES)
    for name in rewards.ATTRIBUTES:
        assert found[1]["attributes"][name] == pytest.approx(found[0]["attributes"][name], abs=1e-4)
    name = next(name for name in conversions.read_tensors(moe) if name.endswith("experts.0.w2.weight"))
    conversions.edit(moe, lambda tensors: tensors[name].mul_(3))
    spoilt = upcycle("evaluate", f"model={moe}", "data=attributes", *data, "format=json")
    assert abs(json.loads(spoilt.out)["mse"] - found[0]["mse"]) > 1e-3


def test_what_it_refuses(reward: Path, data: list[str], upcycle: Callable[..., Outcome], tmp_path: Path) -> None:
    given = (f"model={reward}", "data=attributes", *data)
    upcycle("evaluate", f"model={reward}").refused("needs texts with attributes", found="data=python_stdlib")
    upcycle("evaluate", *given, "tokens=100").refused("tokens is for language models")
    other = data[:1] + ["data.attributes=[prompt]", *data[2:]]
    upcycle("evaluate", f"model={reward}", "data=attributes", *other).refused("does not score", found="prompt")
    language = models.save(models.build("llama", vocab_size=257), tmp_path / "lm")
    byte_tokenizer().save_pretrained(language)
    upcycle("evaluate", f"model={language}", "data=attributes", *data).refused(
        "texts with attributes", remedy="data=text"
    )
