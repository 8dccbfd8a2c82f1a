"""Training a block for multi-token prediction: its starts, exact resume, export and what is measured of it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import conversions
import models
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import training
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from upcycle.checkpoint import open_reader
from upcycle.data.windows import Windows
from upcycle.errors import ConfigError, SourceError
from upcycle.evaluation.ahead import AheadSums
from upcycle.evaluation.losses import domain_losses
from upcycle.models.ahead import ahead_block, ahead_logits, attach, before_head, load_block
from upcycle.sweep.check import estimate
from upcycle.train.config import ExportConfig
from upcycle.train.export import export
from upcycle.train.flops import ahead_flops, forward_flops
from upcycle.train.models import conversion_request, start_model

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

pytest_plugins = ("text_model",)
MOE = ("moe.expansion=4", "moe.granularity=2", "moe.top_k=4")
BALANCED = ("balance.bias_update=1e-2", "balance.aux_loss=1e-2", "balance.z_loss=1e-3", "init.router_std=0.02")
PREFIX = "model.mtp."


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hybrid that reads bytes."""
    return models.save(models.build("nemotron_h", vocab_size=300), tmp_path_factory.mktemp("hybrid"))


def given(hybrid: Path, *more: str, arm: str = "upcycle") -> tuple[str, ...]:
    return (f"model={arm}", f"source='{hybrid}'", "tokenizer=bytes", *MOE, "mtp.depths=2", *more)


def exported(run: Path, output: Path) -> Path:
    return export(ExportConfig(run=str(run), output=str(output), checkpoint="last", dtype="float32", overwrite=False))


@pytest.fixture(scope="module")
def trained(hybrid: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that copied the block."""
    output = tmp_path_factory.mktemp("trained") / "run"
    training.run(training.options(text, output, *given(hybrid, "mtp.start=copy", *BALANCED)))
    return output


def test_it_learns_and_is_measured(trained: Path) -> None:
    rows = training.rows(trained)
    losses = [row["train/mtp_loss"] for row in rows if "train/mtp_loss" in row]
    assert losses[-1] < losses[0]
    last = rows[-1]
    assert last["val/mtp_2/loss"] > 0
    assert 0 <= last["val/mtp_3/accepted"] <= last["val/mtp_2/accepted"] <= 1


def test_the_model_itself_starts_where_it_does_without(hybrid: Path, text: Path, trained: Path, tmp_path: Path) -> None:
    training.run(training.options(text, tmp_path / "run", *given(hybrid, *BALANCED)))
    with_it, without = training.rows(trained)[0], training.rows(tmp_path / "run")[0]
    assert with_it["val/loss"] == without["val/loss"]
    spent, spent_without = (training.rows(run)[-2]["train/flops"] for run in (trained, tmp_path / "run"))
    assert spent > spent_without
    assert not any("mtp" in name for row in training.rows(tmp_path / "run") for name in row)


def test_resumed_exactly(hybrid: Path, text: Path, trained: Path, tmp_path: Path) -> None:
    config = training.options(text, tmp_path / "run", *given(hybrid, "mtp.start=copy", *BALANCED), "resume=auto")
    with pytest.raises(RuntimeError, match="plug"):
        training.run(config, [training.At(4, training.fail)])
    training.run(config)
    one, other = (training.checkpoint(run)["state_dict"] for run in (trained, tmp_path / "run"))
    assert any(name.startswith(PREFIX) for name in one)
    assert training.differing_tensors(one, other) == []
    assert training.rows(tmp_path / "run") == training.rows(trained)


def test_its_router_is_balanced_and_its_groups_hold(trained: Path) -> None:
    """As those of the model's own layers, and measured under names of its own."""
    state = training.checkpoint(trained)["state_dict"]
    for gate in ("model.model.layers.3.mixer.gate.", f"{PREFIX}layers.1.mixer.gate."):
        rows, bias = state[f"{gate}weight"], state[f"{gate}e_score_correction_bias"]
        assert torch.equal(rows[::2], rows[1::2])
        assert not torch.equal(rows[0], rows[2])
        assert bias.any()
        assert torch.equal(bias[::2], bias[1::2])
    own, ahead = (state[f"{each}mixer.gate.weight"] for each in ("model.model.layers.3.", f"{PREFIX}layers.1."))
    assert not torch.equal(own, ahead)
    measured = [row for row in training.rows(trained) if "train/loss" in row]
    assert len(measured) == 6
    for row in measured:
        assert sum(row["mtp/layer_1/load"]) == pytest.approx(1)
        assert row["mtp/layer_1/max_vio"] == pytest.approx(max(row["mtp/layer_1/load"]) * 8 - 1)
        assert row["mtp/layer_1/whole_ffns"] == 1
        assert row["train/mtp_aux_loss"] != row["train/aux_loss"]
        layers = {name.split("/")[1] for name in row if name.startswith("moe/layer")}
        assert layers == {"layer_1", "layer_3"}
        assert row["moe/max_vio"] == pytest.approx(sum(row[f"moe/{each}/max_vio"] for each in layers) / 2)


def test_its_router_and_experts_have_the_learning_rates_of_such(hybrid: Path, text: Path, tmp_path: Path) -> None:
    made = given(hybrid, "mtp.start=random", "optim.router_lr=0", "optim.expert_lr=0", "optim.weight_decay=0.1")
    config = training.options(text, tmp_path / "run", *made)
    before = start_model(config).model.state_dict()
    training.run(config)
    after = training.checkpoint(tmp_path / "run")["state_dict"]
    block = {name: each for name, each in before.items() if name.startswith("mtp.") and each.dim() > 1}
    moved = {name for name, each in block.items() if not torch.equal(each, after[f"model.{name}"])}
    assert {name for name in block if ".gate." in name or ".experts." in name} == block.keys() - moved


@pytest.mark.parametrize("how", ["copy", "random"])
def test_it_starts_as_convert_writes_it(how: str, hybrid: Path, text: Path, tmp_path: Path) -> None:
    """Upcycled in memory, and given to a mixture that was converted without; the mutant has another seed."""
    arm = training.options(text, tmp_path / "run", *given(hybrid, f"mtp.start={how}", "seed=3", *BALANCED))
    request = replace(conversion_request(arm), mtp=how, output=str(tmp_path / "made"))
    made = conversions.run(request).directory
    without = conversions.run(replace(request, mtp="none", output=str(tmp_path / "without"))).directory
    later = ("model=checkpoint", f"source='{without}'", "tokenizer=bytes", f"mtp.start={how}", "seed=3")
    other = given(hybrid, f"mtp.start={how}", "seed=4", *BALANCED)
    starts = [arm, *(training.options(text, tmp_path / "run", *each) for each in (later, other))]
    written = load_block(conversions.load(made), made)
    upcycled, converted, mutant = (ahead_block(start_model(each).model) for each in starts)
    expected, *found, other_seed = (
        dict(block.layers.state_dict()) for block in (written, upcycled, converted, mutant) if block
    )
    assert [training.differing_tensors(expected, each) for each in found] == [[], []]
    assert training.differing_tensors(expected, other_seed)


def test_a_sweep_counts_a_dense_models_own_block(hybrid: Path, text: Path, tmp_path: Path) -> None:
    """From config.json alone, as much as a run would train."""
    dense = given(hybrid, "mtp.start=copy", "budget.steps=1", arm="dense")
    run = training.run(training.options(text, tmp_path / "run", *dense))
    kept = given(exported(tmp_path / "run", tmp_path / "out"), "mtp.start=keep", arm="dense")
    counted = estimate(training.options(text, tmp_path / "again", *kept), ranks=None, execute=True)
    assert counted.parameters == run.start.model.num_parameters()
    without = given(tmp_path / "out", arm="dense")
    assert estimate(training.options(text, tmp_path / "again", *without), ranks=None, execute=True) != counted


def test_rows_that_differ_within_a_group_are_refused_by_name(trained: Path, text: Path, tmp_path: Path) -> None:
    output = exported(trained, tmp_path / "out")

    def tear(tensors: dict[str, Tensor]) -> None:
        tensors["mtp.layers.1.mixer.gate.weight"][1] += 1

    conversions.edit(output, tear)
    kept = ("model=checkpoint", f"source='{output}'", "tokenizer=bytes", "mtp.start=keep")
    with pytest.raises(ConfigError, match=r"moe\.groups=tied needs router rows") as error:
        training.run(training.options(text, tmp_path / "run", *kept))
    assert "rows of layer 1 of the block for multi-token prediction" in str(error.value)


def test_exported_under_its_published_names_and_kept(trained: Path, text: Path, tmp_path: Path) -> None:
    output = exported(trained, tmp_path / "out")
    written = json.loads((output / "config.json").read_text())
    assert (written["num_nextn_predict_layers"], written["mtp_hybrid_override_pattern"]) == (1, "*E")
    stored = open_reader(output).tensors
    assert stored["mtp.layers.0.eh_proj.weight"].shape == (models.HIDDEN, 2 * models.HIDDEN)
    assert "mtp.layers.1.mixer.experts.3.down_proj.weight" in stored
    assert "mtp.layers.1.final_layernorm.weight" in stored

    kept = ("model=checkpoint", f"source='{output}'", "tokenizer=bytes", "mtp.start=keep", "mtp.depths=2")
    training.run(training.options(text, tmp_path / "kept", *kept))
    before, after = training.rows(trained)[-1], training.rows(tmp_path / "kept")[0]
    assert after["val/mtp_2/loss"] == pytest.approx(before["val/mtp_2/loss"], rel=1e-5)
    assert after["val/loss"] == pytest.approx(before["val/loss"], rel=1e-5)


def test_left_out_with_a_word(trained: Path, text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    output = exported(trained, tmp_path / "out")
    arm = ("model=checkpoint", f"source='{output}'", "tokenizer=bytes")
    training.run(training.options(text, tmp_path / "run", *arm))
    assert "left out of what is trained" in caplog.text
    again = exported(tmp_path / "run", tmp_path / "again")
    assert json.loads((again / "config.json").read_text())["num_nextn_predict_layers"] == 0
    assert not any(name.startswith("mtp.") for name in open_reader(again).tensors)


def test_a_dense_hybrid_has_an_ffn_in_its_block(hybrid: Path, text: Path, tmp_path: Path) -> None:
    run = training.run(
        training.options(text, tmp_path / "run", *given(hybrid, "mtp.start=random", arm="dense"), "mtp.depths=1")
    )
    assert run.start.model.config.mtp_layers_block_type == ["full_attention", "mlp"]
    assert "val/mtp_2/loss" in training.rows(tmp_path / "run")[-1]
    assert "val/mtp_3/loss" not in training.rows(tmp_path / "run")[-1]


def with_block() -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = models.build("nemotron_h")
    return model, attach(model, ("*", "-"))


def test_every_depth_predicts_the_token_after_those_that_it_knows() -> None:
    """Against a loop over positions, which sees of the text what it may see."""
    model, block = with_block()
    ids = models.token_ids()
    labels = torch.cat([ids[:, 1:], ids[:, :1]], dim=1)
    with torch.no_grad(), before_head(model) as seen:
        model(input_ids=ids)
    (hidden,) = seen
    (first, after), (second, after_that) = ahead_logits(model, block, hidden, labels, depths=2)
    assert torch.equal(after, labels[:, 1:])
    assert torch.equal(after_that, labels[:, 2:])
    with torch.no_grad():
        embedded = model.get_input_embeddings()(labels)
        one = block(hidden[:, :-1], embedded[:, :-1])
        torch.testing.assert_close(first, model.lm_head(one))
        torch.testing.assert_close(second, model.lm_head(block(one[:, :-1], embedded[:, 1:-1])))
        # Causal: what comes later changes nothing.
        changed = labels.clone()
        changed[:, 6:] = 5
        other, _ = next(ahead_logits(model, block, hidden, changed, depths=1))
    torch.testing.assert_close(other[:, :6], first[:, :6])
    assert not torch.allclose(other[:, 6:], first[:, 6:])


class Sure(torch.nn.Module):
    """A block that knows what the model would say next: its output at the next position."""

    def __init__(self, hidden: Tensor, shift: int) -> None:
        super().__init__()
        self.hidden, self.shift, self.depth = hidden, shift, 0

    def forward(self, hidden: Tensor, _embedded: Tensor) -> Tensor:
        self.depth += 1
        start = self.depth + self.shift
        return self.hidden[:, start : start + hidden.shape[1]]


@pytest.mark.parametrize(("shift", "accepted"), [(0, True), (-1, False)])
def test_what_the_model_would_say_is_accepted(shift: int, accepted: bool) -> None:
    """The mutant is one token late."""
    model, _ = with_block()
    tokens = torch.arange(3 * 13) % 50 + 4
    windows = Windows(tokens.numpy(), np.zeros(1, dtype=np.int64), sequence_length=12, document_attention=False)
    batch = torch.stack([torch.as_tensor(windows[index]["input_ids"]) for index in range(len(windows))])
    with torch.no_grad(), before_head(model) as seen:
        model(input_ids=batch)
    ahead: Any = AheadSums(model, Sure(seen[0], shift), depths=2)
    domain_losses(model, {"all": windows}, batch_size=len(windows), windows=None, ahead=ahead)
    found = ahead.measured()
    assert all((each.accepted == 1.0) == accepted for each in found)
    with torch.no_grad():
        own = F.cross_entropy(model.lm_head(seen[0])[:, 1:].flatten(0, 1), labels_of(windows)[:, 1:].flatten())
    assert (found[0].loss == pytest.approx(own.item(), rel=1e-5)) == accepted


def test_it_is_measured_on_the_passes_of_the_models_own_losses() -> None:
    """Over all domains together, with no more passes of the model than without."""
    model, block = with_block()
    shape: dict[str, Any] = {"sequence_length": 12, "document_attention": False}
    one, other = (
        Windows(np.arange(count * 13) * step % 50 + 4, np.zeros(1, dtype=np.int64), **shape)
        for count, step in ((5, 7), (3, 11))
    )
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    found, alone = [], []
    for domains in ({"a": one, "b": other}, {"a": one}, {"b": other}):
        ahead = AheadSums(model, block, depths=2)
        given = {"batch_size": 2, "windows": None}
        assert domain_losses(model, domains, **given, ahead=ahead) == domain_losses(model, domains, **given)
        (found if len(domains) > 1 else alone).append(ahead.measured())
    assert len(passes) == 2 * 2 * (3 + 2)
    for depth in range(2):
        a, b = (each[depth] for each in alone)
        mean = (len(one) * a.loss + len(other) * b.loss) / (len(one) + len(other))
        assert found[0][depth].loss == pytest.approx(mean)


def labels_of(windows: Windows) -> Tensor:
    return torch.stack([torch.as_tensor(windows[index]["labels"]) for index in range(len(windows))])


def test_flops_count_the_block_for_every_depth() -> None:
    model, block = with_block()
    weights = sum(each.numel() for name, each in block.named_parameters() if each.dim() == 2)
    head = model.lm_head.weight.numel()
    attention = 4 * 16 * 4 * 8
    assert ahead_flops(model, sequence_length=16, depths=2) == 2 * (2 * (weights + head) + attention)
    alone = models.build("nemotron_h")
    assert forward_flops(model, None, sequence_length=16) == forward_flops(alone, None, sequence_length=16)
    assert ahead_flops(alone, sequence_length=16, depths=2) == 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (("mtp.start=both",), ConfigError, r"unknown mtp\.start"),
        (("mtp.start=copy", "mtp.depths=0"), ConfigError, r"mtp\.depths is out of range"),
        (("mtp.start=copy", "mtp.weight=-1"), ConfigError, r"mtp\.weight must not be negative"),
        (("mtp.start=keep",), SourceError, "needs a source with layers for multi-token prediction"),
    ],
)
def test_what_cannot_be_is_refused(
    options: tuple[str, ...], error: type[Exception], message: str, hybrid: Path, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        training.run(training.options(text, tmp_path / "run", *given(hybrid, *options)))
    assert not (tmp_path / "run").exists()


def test_a_family_without_is_refused(text_model: Path, text: Path, tmp_path: Path) -> None:
    arm = ("model=dense", f"source='{text_model}'", "mtp.start=random")
    with pytest.raises(ConfigError, match="no layers for multi-token prediction"):
        training.run(training.options(text, tmp_path / "run", *arm))


def test_a_checkpoint_that_lost_its_block(trained: Path, tmp_path: Path) -> None:
    output = exported(trained, tmp_path / "out")
    tensors = load_file(output / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("mtp.")}
    save_file(kept, output / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match="the files do not have"):
        load_block(AutoModelForCausalLM.from_pretrained(output), output)
