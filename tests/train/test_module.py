"""Steps of the module against a bare loop, its losses by hand, its optimizer's groups."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
import training
from lightning.pytorch import Callback
from transformers import AutoModelForCausalLM

from upcycle.data.corpus import build_corpus
from upcycle.errors import TrainingError
from upcycle.init.rng import derived_seed
from upcycle.train.models import start_model
from upcycle.train.objectives.causal_lm import token_loss
from upcycle.train.optim import adamw
from upcycle.train.schedule import learning_rate

if TYPE_CHECKING:
    from pathlib import Path

    from upcycle.train.config import TrainConfig

pytest_plugins = ("text_model",)


def bare_loop(config: TrainConfig, *, micro: int, clip: float) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Plain PyTorch: the same model, data and optimizer, without Lightning."""
    start = start_model(config)
    corpus = build_corpus(config.data, start.tokenizer, sequence_length=config.sequence_length)
    order = corpus.order(config.seed)
    optimizer = adamw(start.model, None, config.optim, peak=config.schedule.peak)
    sequences, steps = config.batch.sequences, config.budget.steps
    assert steps is not None
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.schedule, step, steps=steps, tokens_per_step=sequences * 32)
        total = 0.0
        for first in range(0, sequences, micro):
            items = [corpus.train[order[step * sequences + first + i]] for i in range(micro)]
            ids, labels = (torch.stack([item[name] for item in items]) for name in ("input_ids", "labels"))
            loss = F.cross_entropy(start.model(input_ids=ids, use_cache=False).logits.flatten(0, 1), labels.flatten())
            (loss / (sequences // micro)).backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(start.model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total / (sequences // micro))
    return start.model.state_dict(), losses


def test_training_is_a_bare_loop(text: Path, text_model: Path, tmp_path: Path) -> None:
    """Bit for bit in float32, with accumulation, clipping and warm-up; and a mutant that clips at another norm."""
    config = training.options(
        text, tmp_path / "run", "model=dense", f"source='{text_model}'", "optim.clip=0.5", "schedule.warmup=3"
    )
    training.run(config)
    state = {
        name.removeprefix("model."): value
        for name, value in training.checkpoint(tmp_path / "run")["state_dict"].items()
    }
    expected, losses = bare_loop(config, micro=2, clip=0.5)
    assert training.differing_tensors(state, expected) == []
    assert [row["train/loss"] for row in training.rows(tmp_path / "run") if "train/loss" in row] == pytest.approx(
        losses
    )
    mutant, _ = bare_loop(config, micro=2, clip=0.4)
    assert training.differing_tensors(state, mutant) != []


def test_the_arms_see_the_same_data(text: Path, text_model: Path, tmp_path: Path) -> None:
    seen: dict[str, list[torch.Tensor]] = {}

    class See(Callback):
        def __init__(self, name: str) -> None:
            self._seen = seen.setdefault(name, [])

        def on_train_batch_start(self, _trainer: Any, _module: Any, batch: Any, _index: int) -> None:
            self._seen.append(batch["input_ids"])

    for arm in ("dense", "upcycle", "scratch"):
        config = training.options(
            text, tmp_path / arm, f"model={arm}", f"source='{text_model}'", *training.SMALL_MOE, "budget.steps=2"
        )
        training.run(config, [See(arm)])
    assert len(seen["dense"]) == 4
    assert training.differing_tensors(seen["dense"], seen["upcycle"]) == []
    assert training.differing_tensors(seen["dense"], seen["scratch"]) == []


def test_distillation_pulls_to_the_teacher(text: Path, text_model: Path, tmp_path: Path) -> None:
    """From random weights, with the teacher's distribution as the only target, the KL falls."""
    made = [
        "model=scratch",
        f"source='{text_model}'",
        *training.SMALL_MOE,
        "distill.weight=1",
        "distill.temperature=2",
        "budget.steps=12",
    ]
    run = training.run(training.options(text, tmp_path / "run", *made))
    losses = [row["train/distill_loss"] for row in training.rows(tmp_path / "run") if "train/distill_loss" in row]
    assert losses[-1] < 0.8 * losses[0]
    assert not any("teacher" in name for name in training.checkpoint(tmp_path / "run")["state_dict"])
    batch = run.corpus.train[0]
    inputs = {"input_ids": batch["input_ids"][None]}
    teacher = AutoModelForCausalLM.from_pretrained(text_model)
    with torch.no_grad():
        logits = run.module.model(**inputs).logits
        log_p, log_q = ((each.flatten(0, 1) / 2).log_softmax(-1) for each in (teacher(**inputs).logits, logits))
        by_hand = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        torch.testing.assert_close(run.module.objective.distillation(logits, inputs), by_hand, rtol=1e-5, atol=1e-6)


def test_a_scheduled_bias_starts_at_its_start(text: Path, text_model: Path, tmp_path: Path) -> None:
    """The first step moves it by the first coefficient, the second one by the next; then it stays."""
    made = ["model=upcycle", f"source='{text_model}'", *training.SMALL_MOE, "target=upcycled_moe"]
    schedule = "balance.bias_update={start: 0.5, end: 0.0, steps: 2}"
    run = training.run(training.options(text, tmp_path / "run", *made, schedule, "budget.steps=4"))
    assert run.module.routing is not None
    for router in run.module.routing.routers.values():
        assert router.e_score_correction_bias is not None
        assert set(router.e_score_correction_bias.abs().tolist()) <= {0.0, 0.25, 0.5, 0.75}
        assert router.e_score_correction_bias.any()


def test_parameter_groups(text: Path, text_model: Path, tmp_path: Path) -> None:
    start = start_model(
        training.options(text, tmp_path / "run", "model=upcycle", f"source='{text_model}'", *training.SMALL_MOE)
    )
    config = training.options(text, tmp_path / "run", "model=dense", "optim.router_lr=0.5", "optim.expert_lr=2")
    groups = {group["name"]: group for group in adamw(start.model, start.moe, config.optim, peak=1e-3).param_groups}
    names = {id(parameter): name for name, parameter in start.model.named_parameters()}
    members = {group: {names[id(each)] for each in fields["params"]} for group, fields in groups.items()}
    assert {group: (fields["lr"], fields["weight_decay"]) for group, fields in groups.items()} == {
        "matrices": (1e-3, 0.1),
        "vectors": (1e-3, 0.0),
        "routers": (5e-4, 0.0),
        "experts": (2e-3, 0.1),
    }
    assert members["routers"] == {f"model.layers.{layer}.mlp.gate.weight" for layer in start.moe.layers}  # type: ignore[union-attr]
    assert all(".experts." in name for name in members["experts"])
    assert all("norm" in name for name in members["vectors"])
    trained = {name for name, parameter in start.model.named_parameters() if parameter.numel()}
    assert set.union(*members.values()) == trained


def test_routers_and_experts_learn_at_their_own_rates(text: Path, text_model: Path, tmp_path: Path) -> None:
    frozen = ["optim.router_lr=0", "optim.expert_lr=0", "optim.weight_decay=0"]
    config = training.options(
        text, tmp_path / "run", "model=upcycle", f"source='{text_model}'", *training.SMALL_MOE, *frozen
    )
    run = training.run(config)
    before = start_model(config).model.state_dict()
    changed = training.differing_tensors(before, run.module.model.state_dict())
    assert changed != []
    assert not [name for name in changed if ".experts." in name or name.endswith("mlp.gate.weight")]


def test_gradients_are_freed_after_a_step(text: Path, text_model: Path, tmp_path: Path) -> None:
    """They do not lie beside the next step's activations; within a step, micro-batches add up."""
    kept: list[bool] = []

    class See(Callback):
        def on_train_batch_end(self, _trainer: Any, module: Any, *_: Any) -> None:
            kept.append(any(parameter.grad is not None for parameter in module.model.parameters()))

    training.run(training.options(text, tmp_path / "run", "model=dense", f"source='{text_model}'"), [See()])
    assert kept == [True, False] * 6


def test_a_loss_that_is_not_finite(text: Path, text_model: Path, tmp_path: Path) -> None:
    """It names step and layer, stops, and keeps the checkpoint from before."""

    class Break(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, _batch: Any, _index: int) -> None:
            if trainer.global_step == 4:
                with torch.no_grad():
                    module.model.model.layers[1].self_attn.o_proj.weight[0, 0] = float("nan")

    made = ["model=dense", f"source='{text_model}'", "checkpoint_every=3"]
    with pytest.raises(TrainingError, match=r"step 5, first in model\.layers\.1\.self_attn\.o_proj \(its weight"):
        training.run(training.options(text, tmp_path / "run", *made), [Break()])
    kept = training.checkpoint(tmp_path / "run")
    assert kept["global_step"] == 3
    assert all(value.isfinite().all() for value in kept["state_dict"].values())
    assert training.run(training.options(text, tmp_path / "run", *made, "resume=auto")).record.last["train/loss"]


@pytest.mark.parametrize("change", ["precision=bfloat16", "activation_checkpointing=true"])
def test_precision_and_checkpointing_train_alike(text: Path, text_model: Path, tmp_path: Path, change: str) -> None:
    """bfloat16 to 5 %, recomputing exactly to rounding; weights stay float32."""
    made = ["model=upcycle", f"source='{text_model}'", *training.SMALL_MOE]
    plain = training.run(training.options(text, tmp_path / "plain", *made)).record.last
    changed = training.run(training.options(text, tmp_path / "changed", *made, change))
    assert changed.record.last["val/loss"] == pytest.approx(plain["val/loss"], rel=0.05 if "bf" in change else 1e-4)
    state = training.checkpoint(tmp_path / "changed")["state_dict"]
    assert {value.dtype for value in state.values()} == {torch.float32}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute of a Tensor")  # of torch's own
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled(text: Path, text_model: Path, tmp_path: Path) -> None:
    """The same losses to 1e-3, and one compilation for all steps: experts stay out of it."""
    made = ["model=upcycle", f"source='{text_model}'", *training.SMALL_MOE]
    plain = training.run(training.options(text, tmp_path / "plain", *made)).record.last
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    compiled = training.run(training.options(text, tmp_path / "compiled", *made, "compile=true")).record.last
    assert compiled["train/loss"] == pytest.approx(plain["train/loss"], rel=1e-3)
    assert counters["stats"]["unique_graphs"] > 0
    assert "recompile_limit" not in str(counters["graph_break"])


def test_token_loss_is_shifted_by_the_data_alone() -> None:
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(7, (2, 5), generator=torch.Generator().manual_seed(1))
    by_hand = -torch.stack([logits[b, t].log_softmax(-1)[labels[b, t]] for b in range(2) for t in range(5)]).mean()
    torch.testing.assert_close(token_loss(logits, labels), by_hand)
    assert derived_seed(0, "a") != derived_seed(0, "b")
