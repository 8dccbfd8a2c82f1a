"""Reward models: every family keeps its head in a conversion, NeMo's bias becomes offsets, bad ones are refused."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import conversions
import models
import pytest
import rewards
import torch
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoConfig, AutoModelForCausalLM

from upcycle.arch.head import CAUSAL, NEMO_ATTRIBUTES, OFFSETS, REWARD, attributes_of, head_of
from upcycle.arch.targets import TARGETS
from upcycle.convert.prepare import prepare
from upcycle.errors import ConfigError, SourceError, TargetError
from upcycle.models.load import load_dense
from upcycle.models.source import open_source
from upcycle.parallel.sizes import conversion_sizes

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

EXACT = {"router_order": "topk_softmax"}
FAMILIES = [name for name in models.ONE_PER_FAMILY if name != "nemotron_h"]
CLOSE = 2e-6  # scores are of order 1


def config_json(directory: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return content


def changed(directory: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    content = config_json(directory)
    change(content)
    (directory / "config.json").write_text(json.dumps(content))
    return directory


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save(rewards.build("llama"), tmp_path_factory.mktemp("reward") / "llama")


@pytest.fixture
def spoilt(reward: Path, tmp_path: Path) -> Path:
    return shutil.copytree(reward, tmp_path / "spoilt")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_reward_model_keeps_its_head(name: str, tmp_path: Path) -> None:
    source = models.save(rewards.build(name), tmp_path / "dense")
    expected = rewards.scores(source, models.token_ids())
    for target in ("auto", "upcycled_moe"):
        made = conversions.run(conversions.options(source, tmp_path / target, target=target, **EXACT))
        assert made.plan.losses == ()
        config = config_json(made.directory)
        assert config["architectures"] == [REWARD.architecture(TARGETS[config["model_type"]].architecture)]
        assert list(config["id2label"].values()) == list(rewards.ATTRIBUTES)
        assert config["problem_type"] == "regression"
        found = rewards.scores(made.directory, models.token_ids())
        assert float((found - expected).abs().max()) < CLOSE


def test_a_lost_row_of_the_head_is_seen(reward: Path, tmp_path: Path) -> None:
    """The mutant of the comparison above."""
    made = conversions.run(conversions.options(reward, tmp_path / "moe", **EXACT))
    conversions.edit(made.directory, lambda tensors: tensors["score.weight"][1].zero_())
    found = rewards.scores(made.directory, models.token_ids())
    assert float((found - rewards.scores(reward, models.token_ids())).abs().max()) > 100 * CLOSE


def test_the_table_of_types_is_transformers() -> None:
    for target in TARGETS.values():
        config = AutoConfig.for_model("llama") if target.generic else AutoConfig.for_model(target.model_type)
        assert (type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING) is target.reward


def test_a_tied_embedding_is_no_head(tmp_path: Path) -> None:
    """Qwen2's config ties its head; a reward model has none that could be, and the copy for engines is not written."""
    source = models.save(rewards.build("qwen2"), tmp_path / "dense")
    made = conversions.run(conversions.options(source, tmp_path / "moe", target="qwen2_moe", **EXACT))
    assert config_json(made.directory)["tie_word_embeddings"] is False
    assert not any("lm_head" in name for name in conversions.read_tensors(made.directory))


def test_what_is_stored_says_it_where_config_json_does_not(spoilt: Path) -> None:
    source = open_source(str(changed(spoilt, lambda config: config.pop("architectures"))))
    assert source.model.head is REWARD
    load_dense(source)


def test_types_without_such_a_class_are_refused(reward: Path, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="head is reward, it can express causal"):
        conversions.run(conversions.options(reward, tmp_path / "moe", target="granitemoeshared", **EXACT))
    hybrid = models.save(models.build("nemotron_h"), tmp_path / "hybrid")
    changed(hybrid, lambda config: config.update(architectures=["NemotronHForSequenceClassification"]))
    conversions.edit(hybrid, lambda tensors: tensors.update({"score.weight": tensors.pop("lm_head.weight")[:2]}))
    with pytest.raises(SourceError, match="transformers has no nemotron_h with a reward head"):
        open_source(str(hybrid))


def test_a_reward_model_without_its_head(spoilt: Path) -> None:
    conversions.edit(spoilt, lambda tensors: tensors.pop("score.weight"))
    with pytest.raises(SourceError, match=r"its head is not stored[\s\S]*train objective=regression"):
        open_source(str(spoilt))


def test_another_number_of_labels(spoilt: Path) -> None:
    changed(spoilt, lambda config: config.update(id2label={0: "a", 1: "b"}, label2id={"a": 0, "b": 1}))
    with pytest.raises(SourceError, match=r"another number of attributes[\s\S]*3 rows[\s\S]*set id2label"):
        open_source(str(spoilt))


def test_a_language_model_is_none(tmp_path: Path) -> None:
    source = models.save(models.build("llama"), tmp_path / "lm")
    assert open_source(str(source)).model.head is CAUSAL
    conversions.edit(source, lambda tensors: tensors.update({"score.weight": torch.zeros(2, models.HIDDEN)}))
    with pytest.raises(SourceError, match=r"tensors that a llama model does not have[\s\S]*score.weight"):
        open_source(str(source))


def test_a_loss_that_config_json_names_is_kept(spoilt: Path, tmp_path: Path) -> None:
    changed(spoilt, lambda config: config.update(problem_type="single_label_classification"))
    made = conversions.run(conversions.options(spoilt, tmp_path / "moe", **EXACT))
    assert config_json(made.directory)["problem_type"] == "single_label_classification"


def test_nemo_s_head_of_nine(tmp_path: Path) -> None:
    """`rm_head`, with a bias that transformers' head has not: it becomes offsets, by attribute."""
    nine = models.save(rewards.build("llama", attributes=tuple(map(str, range(9)))), tmp_path / "nine")
    bias = torch.linspace(-1, 1, 9)

    def as_in_nemo(tensors: dict[str, Tensor]) -> None:
        tensors["rm_head.weight"], tensors["rm_head.bias"] = tensors.pop("score.weight"), bias

    expected = rewards.scores(nine, models.token_ids())
    conversions.edit(nine, as_in_nemo)
    changed(nine, lambda config: [config.pop(name, None) for name in ("id2label", "label2id", "problem_type")])
    source = open_source(str(nine))
    assert attributes_of(source.model.config) == NEMO_ATTRIBUTES
    made = conversions.run(conversions.options(nine, tmp_path / "moe", **EXACT))
    assert made.plan.dropped == {"rm_head.bias": f"in config.json, as {OFFSETS}"}
    config = config_json(made.directory)
    assert config[OFFSETS] == pytest.approx(dict(zip(NEMO_ATTRIBUTES, bias.tolist(), strict=True)))
    assert tuple(config["id2label"].values()) == NEMO_ATTRIBUTES
    with torch.inference_mode():
        loaded = load_dense(source)(input_ids=models.token_ids()).logits
    for found in (loaded, rewards.scores(made.directory, models.token_ids())):
        assert float((found - expected).abs().max()) < CLOSE


def test_its_training_is_not_planned(reward: Path, tmp_path: Path) -> None:
    conversion = prepare(conversions.options(reward, tmp_path / "moe", **EXACT), execute=False)
    with pytest.raises(ConfigError, match=r"planned for language models alone[\s\S]*leave parallel out"):
        conversion_sizes(conversion)


def test_the_code_travels(tmp_path: Path) -> None:
    """A class of this project's own is named in auto_map, for the head that it has alone."""
    for build, head in ((models.build, CAUSAL), (rewards.build, REWARD)):
        source = models.save(build("gpt2"), tmp_path / head.name)
        made = conversions.run(conversions.options(source, tmp_path / f"{head.name}_moe", **EXACT))
        config = config_json(made.directory)
        assert set(config["auto_map"]) == {"AutoConfig", head.auto}
        assert head_of(config) is head
        assert head.auto in (made.directory / "README.md").read_text()
    assert not hasattr(AutoModelForCausalLM.from_pretrained(tmp_path / "causal_moe"), "score")
