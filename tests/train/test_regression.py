"""objective=regression: its loss by hand, every arm, resuming, exports, and what it refuses."""

from __future__ import annotations

import json
import math
import shutil
from typing import TYPE_CHECKING, Any

import conversions
import models
import pytest
import rewards
import torch
import training
from hydra import compose, initialize_config_dir
from lightning.pytorch import Callback
from transformers import AutoModelForSequenceClassification

from upcycle.arch.head import OFFSETS, attributes_of, head_of
from upcycle.data.bytes_tokenizer import byte_tokenizer
from upcycle.data.rated import MASK
from upcycle.distributed.ranks import ALONE
from upcycle.errors import ConfigError, SourceError
from upcycle.options.arguments import CONF, typed_options
from upcycle.train.config import ExportConfig, TrainConfig
from upcycle.train.export import export
from upcycle.train.models import start_model
from upcycle.train.objectives.choose import kind_of
from upcycle.train.objectives.objective import LOSS
from upcycle.train.objectives.regression import masked_error
from upcycle.train.run import check_options, prepare_run, train

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from upcycle.train.objectives.objective import Objective

PADDING = 3  # of the models' configs, and another token than the end of text


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = models.save(models.build("llama", vocab_size=257), tmp_path_factory.mktemp("lm") / "llama")
    byte_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = models.save(rewards.build("llama", vocab_size=257), tmp_path_factory.mktemp("rm") / "llama")
    byte_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def ratings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rewards.rated(tmp_path_factory.mktemp("ratings") / "ratings.jsonl")


def started(config: TrainConfig) -> tuple[Any, Objective, dict[str, Tensor]]:
    """Model, objective and first batch of a run that has not begun."""
    kind, start = kind_of(config), start_model(config)
    corpus = kind.samples(config, start)
    items = [corpus.train[index] for index in range(8)]
    return (
        start.model,
        kind.make(config, start, corpus),
        {name: torch.stack([item[name] for item in items]) for name in items[0]},
    )


def loss_of(objective: Objective, model: Any, batch: dict[str, Tensor]) -> float:
    return float(objective.loss(model, batch)[LOSS].detach())


def by_hand(model: Any, batch: dict[str, Tensor], *, at: int = -1, masked: bool = True) -> float:
    """A loop over rows without padding: scores of one token of each, and squares over labels that are there."""
    errors = []
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        own = ids[: int(mask.sum())]
        with torch.no_grad():
            hidden = model.model(input_ids=own[None]).last_hidden_state[0, at]
            scores = model.score(hidden)
        squares = [float(s - y) ** 2 for s, y in zip(scores, labels, strict=True) if y != MASK or not masked]
        errors.append(sum(squares) / len(squares))
    return sum(errors) / len(errors)


def test_the_loss_is_that_of_a_loop(reward: Path, ratings: Path, tmp_path: Path) -> None:
    """With padding that is no end of text; and two mutants: labels that are not masked, scores of another token."""
    model, objective, batch = started(rewards.options(ratings, tmp_path / "run", "model=dense", f"source='{reward}'"))
    assert model.config.pad_token_id == PADDING
    assert (batch["labels"] == MASK).any()
    assert len(set(batch["attention_mask"].sum(-1).tolist())) > 1
    found = loss_of(objective, model, batch)
    assert found == pytest.approx(by_hand(model, batch), rel=1e-5)
    assert by_hand(model, batch, masked=False) > 10 * found
    assert abs(by_hand(model, batch, at=-2) - found) > 1e-2 * found
    assert objective.tokens(batch) == int(batch["attention_mask"].sum())


def test_a_score_at_the_padding_is_another(reward: Path, ratings: Path, tmp_path: Path) -> None:
    """The mutant of pooling: transformers takes the last position where it knows no padding."""
    model, objective, batch = started(rewards.options(ratings, tmp_path / "run", "model=dense", f"source='{reward}'"))
    right = loss_of(objective, model, batch)
    model.config.pad_token_id = 200  # in no row
    assert abs(loss_of(objective, model, batch) - right) > 1e-2 * right


def test_what_is_masked_has_no_gradient() -> None:
    scores = torch.randn(3, 2, requires_grad=True)
    labels = torch.tensor([[1.0, MASK], [MASK, 2.0], [0.5, 0.0]])
    masked_error(scores, labels).backward()
    assert scores.grad is not None
    assert scores.grad[0, 1] == scores.grad[1, 0] == 0
    assert scores.grad.count_nonzero() == 4


def test_micro_batches_make_no_difference(reward: Path, ratings: Path, tmp_path: Path) -> None:
    """Whatever labels are in which of them: each row counts the same."""
    for micro in (1, 4):
        changes = ("model=dense", f"source='{reward}'", f"batch.micro={micro}")
        train(rewards.options(ratings, tmp_path / str(micro), *changes), on_start=lambda _run: [])
    one, other = (
        [row["train/mse"] for row in training.rows(tmp_path / name) if "train/mse" in row] for name in ("1", "4")
    )
    assert one == pytest.approx(other, rel=1e-4)


@pytest.mark.parametrize("arm", ["dense", "upcycle", "scratch", "checkpoint"])
def test_every_arm_from_a_language_model(arm: str, language_model: Path, ratings: Path, tmp_path: Path) -> None:
    """A new head, drawn by the seed; what is exported loads in plain transformers and scores as the run did."""
    source = language_model
    if arm == "checkpoint":
        source = conversions.run(conversions.options(language_model, tmp_path / "moe")).directory
    config = rewards.options(ratings, tmp_path / "run", f"model={arm}", f"source='{source}'", *training.SMALL_MOE)
    run = training.run(config)
    rows = training.rows(tmp_path / "run")
    measured = [row for row in rows if "val/mse" in row]
    assert [row["step"] for row in measured] == [0, 3, 6]
    assert measured[-1]["val/mse"] < measured[0]["val/mse"]
    names = {f"val/{each}/{name}" for each in rewards.ATTRIBUTES for name in ("mse", "pearson", "spearman")}
    assert names <= measured[-1].keys()
    assert not any("perplexity" in name or name == "train/loss" for row in rows for name in row)
    trained = [row["train/tokens"] for row in rows if "train/tokens" in row]
    assert trained == sorted(trained)
    assert 6 * 4 * 20 < trained[-1] < 6 * 4 * 48
    output = export(exporting(tmp_path / "run", tmp_path / "out"))
    stored = json.loads((output / "config.json").read_text())
    assert head_of(stored).name == "reward"
    assert (stored["problem_type"], tuple(stored["id2label"].values())) == ("regression", rewards.ATTRIBUTES)
    _, _, batch = started(config)
    loaded = AutoModelForSequenceClassification.from_pretrained(output, dtype=torch.float32)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        scores = [model.eval()(**inputs).logits for model in (run.module.model, loaded)]
    torch.testing.assert_close(*scores, atol=1e-5, rtol=1e-5)


def exporting(run: Path, output: Path) -> ExportConfig:
    return ExportConfig(run=str(run), output=str(output), checkpoint="last", dtype="float32", overwrite=False)


def test_the_new_head_is_the_seed_s(language_model: Path, ratings: Path, tmp_path: Path) -> None:
    """Whatever the arm; and everything else is the language model's."""
    heads = []
    for arm, seed in (("dense", 0), ("upcycle", 0), ("dense", 1)):
        given = (f"model={arm}", f"source='{language_model}'", f"seed={seed}", *training.SMALL_MOE)
        start = start_model(rewards.options(ratings, tmp_path / "run", *given))
        heads.append(start.model.score.weight.detach())
        embedding = start.model.get_input_embeddings().weight
        assert torch.equal(embedding, conversions.read_tensors(language_model)["model.embed_tokens.weight"])
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert float(heads[0].std()) == pytest.approx(0.02, rel=0.3)


@pytest.mark.parametrize("target", ["auto", "upcycled_moe"])
def test_a_reward_model_keeps_its_own(target: str, reward: Path, ratings: Path, tmp_path: Path) -> None:
    for arm in ("dense", "upcycle"):
        given = (f"model={arm}", f"source='{reward}'", f"target={target}", *training.SMALL_MOE)
        start = start_model(rewards.options(ratings, tmp_path / "run", *given))
        weights = dict(start.model.named_parameters())
        head = next(value for name, value in weights.items() if name.endswith("score.weight"))
        assert torch.equal(head, conversions.read_tensors(reward)["score.weight"])
    moe = conversions.run(conversions.options(reward, tmp_path / "moe", target=target)).directory
    start = start_model(rewards.options(ratings, tmp_path / "run", "model=checkpoint", f"source='{moe}'"))
    head = next(value for name, value in start.model.named_parameters() if name.endswith("score.weight"))
    assert torch.equal(head, conversions.read_tensors(reward)["score.weight"])


def test_a_resumed_run_is_the_same(language_model: Path, ratings: Path, tmp_path: Path) -> None:
    """Weights bit for bit, and every row of the record, tokens among them."""
    given = ("model=upcycle", f"source='{language_model}'", *training.SMALL_MOE, "log_every=4")
    training.run(rewards.options(ratings, tmp_path / "whole", *given))
    parts = rewards.options(ratings, tmp_path / "parts", *given, "resume=auto")

    class Interrupted(RuntimeError):
        pass

    class After(Callback):
        def on_train_batch_start(self, trainer: Any, _module: Any, _batch: Any, _index: int) -> None:
            if trainer.global_step == 3:
                raise Interrupted

    with pytest.raises(Interrupted):
        training.run(parts, [After()])
    assert training.run(parts).resumed == 2
    assert training.rows(tmp_path / "parts") == training.rows(tmp_path / "whole")
    states = [training.checkpoint(tmp_path / name)["state_dict"] for name in ("whole", "parts")]
    assert training.differing_tensors(*states) == []


def test_routers_count_no_padding(language_model: Path, ratings: Path, tmp_path: Path) -> None:
    """The load of experts, and what balances it, is of the tokens alone; the mutant counts all."""
    given = ("model=upcycle", f"source='{language_model}'", *training.SMALL_MOE)
    run = prepare_run(rewards.options(ratings, tmp_path / "run", *given), ALONE)
    model, routing = run.module.model, run.module.routing
    assert routing is not None
    batch = {name: torch.stack([run.corpus.train[i][name] for i in range(4)]) for name in run.corpus.train[0]}
    tokens = int(batch["attention_mask"].sum())
    losses = []
    for mask in (batch["attention_mask"], None):
        routing.reset_statistics()
        routing.count_only(mask)
        run.module.objective.loss(model, batch)
        losses.append(float(routing.losses(0).aux.detach()))
        counted = tokens if mask is not None else batch["input_ids"].numel()
        assert routing.statistics().tokens.tolist() == [counted] * 2
        assert routing.statistics().load.sum(-1).tolist() == [2 * counted] * 2
    other = {**batch, "input_ids": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, PADDING + 1)}
    routing.count_only(batch["attention_mask"])
    model.config.pad_token_id = PADDING + 1
    run.module.objective.loss(model, other)
    assert float(routing.losses(0).aux.detach()) == pytest.approx(losses[0], rel=1e-6)
    assert losses[1] != pytest.approx(losses[0], rel=2e-5)


def test_offsets_are_added(reward: Path, ratings: Path, tmp_path: Path) -> None:
    """Scores of a head that had a bias learn what the labels leave over it, and the export keeps it."""
    source = shutil.copytree(reward, tmp_path / "offset")
    content = json.loads((source / "config.json").read_text())
    content[OFFSETS] = dict.fromkeys(rewards.ATTRIBUTES, 2.0)
    (source / "config.json").write_text(json.dumps(content))
    model, objective, batch = started(rewards.options(ratings, tmp_path / "run", "model=dense", f"source='{source}'"))
    shifted = {**batch, "labels": torch.where(batch["labels"] == MASK, MASK, batch["labels"] - 2.0)}
    assert loss_of(objective, model, batch) == pytest.approx(by_hand(model, shifted), rel=1e-5)
    training.run(rewards.options(ratings, tmp_path / "run", "model=dense", f"source='{source}'", "budget.steps=1"))
    output = export(exporting(tmp_path / "run", tmp_path / "out"))
    assert json.loads((output / "config.json").read_text())[OFFSETS] == content[OFFSETS]


def test_a_model_may_score_more_than_the_data(reward: Path, ratings: Path, tmp_path: Path) -> None:
    given = ("model=dense", f"source='{reward}'", "data.attributes=[verbosity]")
    model, objective, batch = started(rewards.options(ratings, tmp_path / "run", *given))
    assert attributes_of(model.config) == rewards.ATTRIBUTES
    assert batch["labels"][:, :2].eq(MASK).all()
    objective.loss(model, batch)[LOSS].backward()
    assert model.score.weight.grad[:2].eq(0).all()
    assert model.score.weight.grad[2].ne(0).any()


def test_a_padding_token_that_is_missing_is_the_tokenizer_s(ratings: Path, tmp_path: Path) -> None:
    for name in ("llama", "gpt2"):
        source = models.save(models.build(name, vocab_size=257, pad_token_id=None), tmp_path / name)
        byte_tokenizer().save_pretrained(source)
        given = ("model=upcycle", f"source='{source}'", "target=upcycled_moe", *training.SMALL_MOE)
        model, objective, batch = started(rewards.options(ratings, tmp_path / "run", *given))
        assert model.config.get_text_config().pad_token_id == model.language_model.config.pad_token_id == 256
        assert math.isfinite(loss_of(objective, model, batch))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (("data=python_stdlib",), r"needs texts with attributes[\s\S]*data=attributes"),
        (("distill.weight=0.5",), r"distillation is of distributions"),
        (("mtp.start=copy",), r"multi-token prediction is of language models"),
        (("router.capacity_factor=1.0",), r"padding would take the places"),
        (("router.expert_choice=true",), r"padding would take the places"),
        (("objective=causal_lm",), r"has texts with attributes[\s\S]*set objective=regression"),
    ],
)
def test_options_that_do_not_go_together(changes: tuple[str, ...], problem: str, ratings: Path, tmp_path: Path) -> None:
    kept = [] if changes[0] != "data=python_stdlib" else ["~data.files", "~data.attributes"]
    if kept:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            given = ["model=dense", "source=x", f"output='{tmp_path}'", "objective=regression", *changes]
            config = typed_options(TrainConfig, compose("train", overrides=[*given, "budget.steps=1"]))
    else:
        config = rewards.options(ratings, tmp_path / "run", "model=dense", "source=x", *changes)
    with pytest.raises(ConfigError, match=problem):
        check_options(config)


def test_sources_that_do_not_fit(reward: Path, language_model: Path, ratings: Path, tmp_path: Path) -> None:
    dense = ("model=dense", f"source='{reward}'")
    with pytest.raises(ConfigError, match=r"does not score[\s\S]*found: +prompt; the model's: helpfulness"):
        start_model(rewards.options(ratings, tmp_path / "run", *dense, "data.attributes=[prompt]"))
    text = [f"output='{tmp_path / 'run'}'", "budget.steps=1", *dense]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        language = typed_options(TrainConfig, compose("train", overrides=text))
    with pytest.raises(ConfigError, match=r"objective=causal_lm trains language models[\s\S]*objective=regression"):
        start_model(language)
    for change, problem in (
        ({"problem_type": "single_label_classification"}, r"is a classifier"),
        ({"id2label": {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}}, r"does not say what the reward model scores"),
    ):
        spoilt = shutil.copytree(reward, tmp_path / next(iter(change)))
        content = json.loads((spoilt / "config.json").read_text())
        (spoilt / "config.json").write_text(json.dumps(content | change))
        with pytest.raises(ConfigError, match=problem):
            start_model(rewards.options(ratings, tmp_path / "run", "model=dense", f"source='{spoilt}'"))
    hybrid = models.save(models.build("nemotron_h", vocab_size=257), tmp_path / "hybrid")
    byte_tokenizer().save_pretrained(hybrid)
    with pytest.raises(SourceError, match="transformers has no nemotron_h with a reward head"):
        start_model(rewards.options(ratings, tmp_path / "run", "model=dense", f"source='{hybrid}'"))
    given = ("model=upcycle", f"source='{language_model}'", "target=granitemoeshared", "moe.router_order=topk_softmax")
    with pytest.raises(SourceError, match="transformers has no granitemoeshared with a reward head"):
        start_model(rewards.options(ratings, tmp_path / "run", *given, *training.SMALL_MOE))
