"""The equivalence report: what it measures, and that it can fail."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import conversions
import models
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from upcycle.errors import ConfigError, OutputError, SourceError
from upcycle.models.manifest import REPORT
from upcycle.models.text import DEFAULT_TEXT
from upcycle.options.config import InspectConfig, VerifyConfig
from upcycle.verify.inspection import inspect
from upcycle.verify.report import FIGURE, report_table, write_report
from upcycle.verify.run import verify

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

pytest_plugins = ("text_model", "tiny")


def options(source: Path, moe: Path) -> VerifyConfig:
    return VerifyConfig(
        source=str(source), moe=str(moe), text=None, tokens=96, sequence_length=48, tolerance=1e-3, format="table"
    )


@pytest.mark.parametrize("target", ["auto", "upcycled_moe", "granitemoeshared"])
@pytest.mark.parametrize("shared", [0, 1])
def test_a_lossless_conversion_passes(text_model: Path, tmp_path: Path, target: str, shared: int) -> None:
    order = "topk_softmax" if target == "granitemoeshared" else "softmax_topk"
    request = conversions.options(
        text_model, tmp_path / "moe", target=target, shared_experts=shared, router_order=order, layers=[0, 1]
    )
    report = verify(options(text_model, conversions.run(request).directory))
    assert report["passed"]
    assert abs(report["loss_gap"]) < 1e-3
    assert abs(report["kl"]) < 1e-4
    assert report["max_ffn_relative_error"] < 1e-3
    assert report["top1_agreement"] > 0.95
    assert report["whole_ffns"] == 1.0
    assert [layer["layer"] for layer in report["layers"]] == [0, 1]


@pytest.mark.parametrize("target", ["nemotron_h", "upcycled_moe"])
@pytest.mark.parametrize("neurons", [None, 4, "all"])
def test_a_lossless_conversion_of_a_hybrid_passes(target: str, neurons: object, tmp_path: Path) -> None:
    """Its MoE layers are two of four, each the whole of a layer's mixer."""
    source = models.save(models.build("nemotron_h"), tmp_path / "dense")
    models.tokenizer().save_pretrained(source)
    request = conversions.options(
        source, tmp_path / "moe", target=target, router_order="auto", shared_neurons=neurons, top_k=4
    )
    report = verify(options(source, conversions.run(request).directory))
    assert report["passed"]
    assert report["max_ffn_relative_error"] < 1e-5
    assert report["whole_ffns"] == 1.0
    assert [layer["layer"] for layer in report["layers"]] == [1, 3]


def test_the_dense_loss_is_that_of_plain_transformers(text_model: Path, text_moe: Path) -> None:
    config = replace(options(text_model, text_moe), tokens=48)
    ids = AutoTokenizer.from_pretrained(text_model)(DEFAULT_TEXT.read_text(), return_tensors="pt")["input_ids"][:, :48]
    for directory, name in ((text_model, "dense_loss"), (text_moe, "moe_loss")):
        model = AutoModelForCausalLM.from_pretrained(directory)
        with torch.inference_mode():
            expected = float(model(input_ids=ids, labels=ids).loss)
        assert verify(config)[name] == pytest.approx(expected, rel=1e-5)


def test_only_the_converted_layers_are_compared(text_model: Path, tmp_path: Path) -> None:
    moe = conversions.run(conversions.options(text_model, tmp_path / "moe", layers="every_2")).directory
    assert [layer["layer"] for layer in verify(options(text_model, moe))["layers"]] == [1]


def test_paper_scaling_is_reported_honestly(text_model: Path, tmp_path: Path) -> None:
    moe = conversions.run(conversions.options(text_model, tmp_path / "moe", scaling="paper")).directory
    report = verify(options(text_model, moe))
    assert not report["passed"]
    assert report["max_ffn_relative_error"] > 0.1
    assert any("init.scaling=paper" in line for line in report["expected_losses"])


def scale_one_expert(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.1.mlp.experts.3.down_proj.weight"] *= 1.5


def untie_router_rows(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.0.mlp.gate.weight"][1] += 0.5


@pytest.mark.parametrize("mutate", [scale_one_expert, untie_router_rows])
def test_a_damaged_conversion_is_seen(text_model: Path, text_moe: Path, tmp_path: Path, mutate: object) -> None:
    damaged = shutil.copytree(text_moe, tmp_path / "damaged")
    conversions.edit(damaged, mutate)  # type: ignore[arg-type]
    report = verify(options(text_model, damaged))
    sound = verify(options(text_model, text_moe))
    assert report["max_ffn_relative_error"] > 100 * sound["max_ffn_relative_error"]
    layer = 1 if mutate is scale_one_expert else 0
    others = [entry for entry in report["layers"] if entry["layer"] != layer]
    assert all(entry["ffn_relative_error"] < 1e-3 for entry in others)
    if mutate is untie_router_rows:
        assert report["layers"][0]["whole_ffns"] < 1.0


def test_the_report_is_written_and_shown(text_model: Path, text_moe: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra plots")
    report = verify(options(text_model, text_moe))
    write_report(report, str(tmp_path))
    assert json.loads((tmp_path / REPORT).read_text()) == report
    assert (tmp_path / FIGURE).read_bytes().startswith(b"\x89PNG")
    assert sorted(file.name for file in tmp_path.iterdir()) == [REPORT, FIGURE]
    text = shown(report)
    for expected in ("dense loss", "KL", "whole FFNs", "equivalent"):
        assert expected in text


@pytest.fixture(scope="module")
def silent_model(text_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with a layer that gives zeros alone, as in models that were made deeper."""
    silent = shutil.copytree(text_model, tmp_path_factory.mktemp("silent") / "llama")
    for part in ("mlp.down_proj", "self_attn.o_proj"):
        conversions.edit(silent, lambda t, part=part: t[f"model.layers.1.{part}.weight"].zero_())
    return silent


def test_a_layer_that_gives_zeros_alone(silent_model: Path, tmp_path: Path) -> None:
    """An MoE layer that does the same has no error; one that does not has one that is no number."""
    moe = conversions.run(conversions.options(silent_model, tmp_path / "moe")).directory
    report = verify(options(silent_model, moe))
    assert report["passed"]
    assert report["layers"][1]["ffn_relative_error"] == 0.0
    assert 0 < report["max_ffn_relative_error"] == report["layers"][0]["ffn_relative_error"] < 1e-3
    assert [layer["across_groups"] for layer in inspect(InspectConfig(path=str(moe), format="table"))["similarity"]]

    conversions.edit(moe, lambda t: t["model.layers.1.mlp.experts.3.down_proj.weight"].fill_(10.0))
    report = verify(options(silent_model, moe))
    assert not report["passed"]
    assert report["layers"][1]["ffn_relative_error"] is None
    assert report["max_ffn_relative_error"] is None
    write_report(report, str(tmp_path))
    assert strictly((tmp_path / REPORT).read_text()) == report
    assert "no number in layer 1: the dense FFN gives zeros alone and the MoE does not" in shown(report)


def test_a_model_that_overflows(text_model: Path, text_moe: Path, tmp_path: Path) -> None:
    """What is measured of it is no number, and says so."""
    damaged = shutil.copytree(text_moe, tmp_path / "damaged")
    conversions.edit(damaged, lambda t: t["model.layers.0.mlp.experts.3.down_proj.weight"].fill_(3e38))
    report = verify(options(text_model, damaged))
    assert not report["passed"]
    write_report(report, str(tmp_path))
    written = strictly((tmp_path / REPORT).read_text())
    assert (written["moe_loss"], written["loss_gap"], written["max_ffn_relative_error"]) == (None, None, None)
    assert "no number (tolerance" in shown(report)


def strictly(text: str) -> dict[str, Any]:
    """Parse JSON, without the numbers that it lacks."""
    found: dict[str, Any] = json.loads(text, parse_constant=pytest.fail)
    return found


def shown(report: dict[str, Any]) -> str:
    console = Console(record=True, width=200)
    console.print(report_table(report))
    return console.export_text()


def test_a_report_that_cannot_be_written(text_model: Path, text_moe: Path, tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        write_report(verify(options(text_model, text_moe)), str(in_the_way))


def test_a_moe_of_another_model_is_refused(text_model: Path, tmp_path: Path, dense: object) -> None:
    other = dense("qwen2")  # type: ignore[operator]
    moe = conversions.run(conversions.options(other, tmp_path / "moe")).directory
    with pytest.raises(SourceError, match="did not come from this dense model"):
        verify(options(text_model, moe))


def test_no_checkpoint_there(text_model: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no config.json there"):
        verify(options(text_model, tmp_path / "nothing"))


def test_a_config_that_is_not_json(text_model: Path, text_moe: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(text_moe, tmp_path / "damaged")
    (damaged / "config.json").write_text("{")
    with pytest.raises(SourceError, match="not JSON"):
        verify(options(text_model, damaged))


def test_a_dense_checkpoint_is_not_a_moe(text_model: Path) -> None:
    with pytest.raises(SourceError, match="not a mixture of experts"):
        verify(options(text_model, text_model))


def test_texts_that_cannot_be_used(text_model: Path, text_moe: Path, tmp_path: Path) -> None:
    sound = options(text_model, text_moe)
    short, binary = tmp_path / "short", tmp_path / "binary"
    short.write_text("")
    binary.write_bytes(b"\xff\xfe\x00")
    for file, message in ((tmp_path / "none", "cannot be read"), (binary, "cannot be read"), (short, "too short")):
        with pytest.raises(ConfigError, match=message):
            verify(replace(sound, text=str(file)))
    with pytest.raises(ConfigError, match="too few tokens"):
        verify(replace(sound, tokens=1))


def test_convert_verifies_what_it_wrote(upcycle, text_model: Path, tmp_path: Path) -> None:
    shape = ("moe.expansion=4", "moe.granularity=2", "moe.top_k=2", "verify=true")
    passed = upcycle("convert", f"source={text_model}", f"output={tmp_path / 'same'}", *shape)
    assert passed.status == 0
    assert json.loads((tmp_path / "same" / REPORT).read_text())["passed"]
    other = upcycle("convert", f"source={text_model}", f"output={tmp_path / 'other'}", *shape, "init=random")
    assert other.status == 1
    assert not json.loads((tmp_path / "other" / REPORT).read_text())["passed"]
