"""Recipes without Megatron: what the files say, who is refused, and that the checkpoint is the source."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import training
from cli import edit_json, process
from models import token_ids
from recipes import EXPERTS, TYPES, assignments, checkpoint, request, with_mixture
from transformers import AutoModelForCausalLM, AutoTokenizer

from upcycle.errors import ConfigError, SourceError, UpcycleError
from upcycle.megatron.export import export_recipe
from upcycle.parallel.config import FoldingConfig
from upcycle.train.config import RecipeConfig
from upcycle.train.export import export

if TYPE_CHECKING:
    from collections.abc import Callable

    from upcycle.train.config import ExportConfig

pytest_plugins = ("text_model",)
ROOT = Path(__file__).parents[2]
FOLDING = FoldingConfig(tp=2, cp=1, pp=2, etp=1, ep=4)
SCHEDULE = "{start: 1e-3, end: 0, steps: 2}"
MOE_RUN = ("model=upcycle", *training.SMALL_MOE, "target=mixtral", "moe.router_order=topk_softmax")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, text_model: Path) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("moe")
    return {name: checkpoint(name, root / name, tokenizer=text_model) for name in TYPES}


@pytest.mark.parametrize("model_type", TYPES)
def test_the_checkpoint_is_the_source(sources: dict[str, Path], tmp_path: Path, model_type: str) -> None:
    directory = export_recipe(request(tmp_path / "out", moe=sources[model_type]))
    models = [AutoModelForCausalLM.from_pretrained(each).eval() for each in (sources[model_type], directory)]
    with torch.no_grad():
        expected, found = (model(token_ids()).logits for model in models)
    assert torch.equal(found, expected)
    assert AutoTokenizer.from_pretrained(directory)("def f(): pass")["input_ids"]


def test_the_files_pass_the_linter_and_the_type_checker(sources: dict[str, Path], tmp_path: Path) -> None:
    directories = [export_recipe(request(tmp_path / name, moe=source)) for name, source in sources.items()]
    assert (tmp_path / "mixtral" / "mixtral_bridge.py").exists()
    assert not (tmp_path / "olmoe" / "mixtral_bridge.py").exists()
    ruff = [sys.executable, "-m", "ruff"]
    for check in (["check", "--no-cache"], ["format", "--check", "--no-cache"]):
        subprocess.run([*ruff, *check, "--config", ROOT / "pyproject.toml", *directories], check=True)
    mypy = [
        sys.executable,
        "-m",
        "mypy",
        "--config-file=",
        "--ignore-missing-imports",
        "--follow-imports=skip",
        "--disallow-untyped-defs",
    ]
    for directory in directories:
        subprocess.run([*mypy, f"--cache-dir={tmp_path}/cache", "."], cwd=directory, check=True)


def test_the_recipe_has_the_folding_that_was_asked_for(sources: dict[str, Path], tmp_path: Path) -> None:
    asked = request(tmp_path / "out", moe=sources["mixtral"], parallel=FOLDING, nodes=2)
    found = assignments(export_recipe(asked) / "recipe.py")
    degrees = ("tensor_model", "context", "pipeline_model", "expert_tensor", "expert_model")
    assert [found[f"{name}_parallel_size"] for name in degrees] == [2, 1, 2, 1, 4]
    assert found["sequence_parallel"] is True
    assert found["global_batch_size"] == 64


def test_the_best_folding_is_chosen_where_none_is_given(sources: dict[str, Path], tmp_path: Path) -> None:
    free = FoldingConfig(tp=None, cp=None, pp=None, etp=None, ep=EXPERTS)
    found = assignments(export_recipe(request(tmp_path / "out", moe=sources["qwen3_moe"], parallel=free)) / "recipe.py")
    assert found["expert_model_parallel_size"] == EXPERTS
    assert found["expert_tensor_parallel_size"] == 1


@pytest.mark.parametrize(("normalised", "pre_softmax"), [(True, False), (False, True)])
def test_the_order_of_softmax_and_top_k(tmp_path: Path, text_model: Path, normalised: bool, pre_softmax: bool) -> None:
    source = checkpoint("olmoe", tmp_path / "moe", tokenizer=text_model, norm_topk_prob=normalised)
    found = assignments(export_recipe(request(tmp_path / "out", moe=source)) / "recipe.py")
    assert found["moe_router_pre_softmax"] is pre_softmax


def test_a_run_brings_its_settings(
    text: Path, text_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changes = [*MOE_RUN, "balance.aux_loss=0.04", "balance.z_loss=0.002", "balance.statistics=global_batch"]
    changes += ["schedule=wsd", "schedule.peak=1e-2", "schedule.warmup=2", "schedule.decay=3", "optim.clip=null"]
    training.run(training.options(text, tmp_path / "run", f"source='{text_model}'", *changes, "router.jitter=0.1"))
    workload = RecipeConfig(sequences=8)
    asked = request(tmp_path / "out", run=tmp_path / "run", workload=workload, steps=None)
    directory = export_recipe(asked)
    found = assignments(directory / "recipe.py")
    expected = {
        "STEPS": 6,
        "SEQUENCE_LENGTH": 32,
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "moe_aux_loss_coeff": 0.02,  # two layers, whose losses Megatron adds up
        "moe_z_loss_coeff": 0.001,
        "moe_router_load_balancing_type": "global_aux_loss",
        "moe_input_jitter_eps": 0.1,
        "lr_decay_style": "WSD",
        "lr_warmup_iters": 2,
        "lr_wsd_decay_iters": 3,
        "lr": 1e-2,
        "clip_grad": 0.0,
    }
    assert {name: found[name] for name in expected} == expected
    said = "the virtual groups of E2G2T2 come apart"
    assert said in (directory / "recipe.py").read_text()
    assert said in caplog.text
    plain = export(request(tmp_path / "plain", run=tmp_path / "run"))
    weights = [AutoModelForCausalLM.from_pretrained(each).state_dict() for each in (directory, plain)]
    assert not training.differing_tensors(*weights)
    assert {file.name for file in plain.iterdir()} < {file.name for file in directory.iterdir()}


@pytest.mark.parametrize("held_out", [0, 2])
def test_a_mixture_brings_its_weights_and_what_is_held_out(
    text: Path, text_model: Path, tmp_path: Path, held_out: int
) -> None:
    options = training.options(text, tmp_path / "run", f"source='{text_model}'", *MOE_RUN)
    training.run(with_mixture(options, text, held_out=held_out))
    directory = export_recipe(request(tmp_path / "out", run=tmp_path / "run"))
    found = assignments(directory / "recipe.py")
    assert found["DOMAINS"] == {"code": 3, "rest": 0.5}
    assert [*found["DOMAINS"]] == ["code", "rest"]  # the order of the prefixes in DATA
    assert found["eval_iters"] == bool(held_out)
    assert assignments(directory / "tokenize_data.py")["HELD_OUT"] == held_out
    assert ("held-out" in (directory / "recipe.py").read_text().partition("def config")[2]) == bool(held_out)


def without_tokenizer(directory: Path) -> None:
    for file in directory.glob("tokenizer*"):
        file.unlink()


def without_end_of_text(directory: Path) -> None:
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("spoil", "words"), [(without_tokenizer, "no tokenizer"), (without_end_of_text, "no end-of-text token")]
)
@pytest.mark.parametrize("model_type", TYPES)
def test_a_checkpoint_that_cannot_end_a_document_is_refused(
    text_model: Path, tmp_path: Path, model_type: str, spoil: Callable[[Path], None], words: str
) -> None:
    source = checkpoint(model_type, tmp_path / "moe", tokenizer=text_model)
    spoil(source)
    with pytest.raises(SourceError, match=words):
        export_recipe(request(tmp_path / "out", moe=source))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model_type", ["qwen2_moe", "llama"])
def test_a_type_without_a_bridge_is_refused(text_moe: Path, text_model: Path, tmp_path: Path, model_type: str) -> None:
    source = {"qwen2_moe": text_moe, "llama": text_model}[model_type]
    with pytest.raises(SourceError, match=f"(?s)no bridge.*{model_type}.*qwen3_moe, olmoe, mixtral"):
        export_recipe(request(tmp_path / "out", moe=source))
    assert not list(tmp_path.iterdir())


LOST: list[tuple[str, dict[str, Any], str]] = [
    ("mixtral", {"sliding_window": 8}, "sliding_window=8"),
    ("mixtral", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_type=linear"),
    ("qwen3_moe", {"attention_bias": True}, "attention_bias=True"),
    ("qwen3_moe", {"mlp_only_layers": [0]}, "layers without experts=1"),
    ("mixtral", {"num_experts_per_tok": 1}, "num_experts_per_tok=1"),
    ("olmoe", {"num_key_value_heads": 2}, "num_key_value_heads=2"),
    ("olmoe", {"clip_qkv": 8.0}, "clip_qkv=8.0"),
    ("nemotron_h", {"mlp_hidden_act": "silu"}, "mlp_hidden_act=silu"),
    ("nemotron_h", {"num_experts_per_tok": 1}, "num_experts_per_tok=1 with sigmoid_topk"),
    ("nemotron_h", {"norm_topk_prob": False}, "norm_topk_prob=false"),
    ("nemotron_h", {"n_group": 4, "topk_group": 2}, "n_group=4, topk_group=2"),
    ("nemotron_h", {"num_nextn_predict_layers": 1}, "num_nextn_predict_layers=1"),
    ("nemotron_h", {"tie_word_embeddings": True}, "tie_word_embeddings=True"),
    ("nemotron_h", {"mlp_bias": True}, "mlp_bias=True"),
    ("nemotron_h", {"use_bias": True}, "use_bias=True"),
    ("nemotron_h", {"use_conv_bias": False}, "use_conv_bias=false"),
    ("nemotron_h", {"conv_kernel": 3}, "conv_kernel=3"),
    ("nemotron_h", {"mamba_hidden_act": "gelu"}, "mamba_hidden_act=gelu"),
    ("nemotron_h", {"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon=1e-06"),
    ("nemotron_h", {"time_step_limit": [0.0, 0.1]}, "time_step_limit="),
    ("nemotron_h", {"hidden_dropout": 0.1}, "hidden_dropout=0.1"),
]


@pytest.mark.parametrize(("model_type", "fields", "found"), LOST, ids=[f"{each[0]}-{each[2]}" for each in LOST])
def test_what_a_bridge_would_lose_is_refused(
    text_model: Path, tmp_path: Path, model_type: str, fields: dict[str, Any], found: str
) -> None:
    source = checkpoint(model_type, tmp_path / "moe", tokenizer=text_model, **fields)
    with pytest.raises(SourceError, match=f"cannot take.*{model_type}(?s:.*){found}"):
        export_recipe(request(tmp_path / "out", moe=source))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("limits", "top_k"), [((4, 1), 2), ((4, 4), 3)])
def test_groups_of_neighbours_that_megatron_chooses_alike(
    text_model: Path, tmp_path: Path, limits: tuple[int, int], top_k: int
) -> None:
    """Its best K / topk_group of a group are the best two of transformers; or all groups are chosen."""
    fields = {"n_group": limits[0], "topk_group": limits[1], "num_experts_per_tok": top_k}
    source = checkpoint("nemotron_h", tmp_path / "moe", tokenizer=text_model, **fields)
    assert export_recipe(request(tmp_path / "out", moe=source)).exists()


def test_a_hybrid_without_experts_is_refused(text_model: Path, tmp_path: Path) -> None:
    source = checkpoint("nemotron_h", tmp_path / "moe", tokenizer=text_model, hybrid_override_pattern="M-*-M-")
    with pytest.raises(SourceError, match="(?s)a mixture of experts.*convert it with target=nemotron_h"):
        export_recipe(request(tmp_path / "out", moe=source))
    assert not (tmp_path / "out").exists()


def test_config_json_of_a_hybrid_is_in_the_words_of_a_recipes_transformers(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    """5.12.1 refuses those that newer ones write."""
    assert "layers_block_type" in json.loads((sources["nemotron_h"] / "config.json").read_text())
    written = json.loads(
        (export_recipe(request(tmp_path / "out", moe=sources["nemotron_h"])) / "config.json").read_text()
    )
    assert written["hybrid_override_pattern"] == "ME*E-M"
    assert "layers_block_type" not in written


def test_a_run_of_a_hybrid_brings_its_biases(sources: dict[str, Path], text: Path, tmp_path: Path) -> None:
    changes = ["model=checkpoint", f"source='{sources['nemotron_h']}'", "balance.bias_update=0.002"]
    training.run(training.options(text, tmp_path / "run", *changes, "router.scaling_factor=1.5"))
    asked = request(tmp_path / "out", run=tmp_path / "run", workload=RecipeConfig(sequences=8), steps=None)
    directory = export_recipe(asked)
    expected = {
        "moe_router_score_function": "sigmoid",
        "moe_router_topk_scaling_factor": 1.5,
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 0.002,
    }
    found = assignments(directory / "recipe.py")
    assert {name: found[name] for name in expected} == expected
    assert "\nmamba-ssm==" in (directory / "requirements.txt").read_text()


def test_pipelines_of_hybrids_are_not_interleaved(sources: dict[str, Path], tmp_path: Path) -> None:
    """Megatron-Bridge has no virtual stages of them; without that, these would be 3 layers apart."""
    directory = export_recipe(request(tmp_path / "out", moe=sources["nemotron_h"], parallel=FOLDING))
    assert assignments(directory / "recipe.py")["virtual_pipeline_model_parallel_size"] is None


@pytest.mark.parametrize("option", [f"balance.bias_update={SCHEDULE}", "mtp.start=random"])
def test_training_of_a_hybrid_that_a_recipe_cannot_express_is_refused(
    sources: dict[str, Path], text: Path, tmp_path: Path, option: str
) -> None:
    given = ["model=checkpoint", f"source='{sources['nemotron_h']}'", option]
    training.run(training.options(text, tmp_path / "run", *given))
    asked = request(tmp_path / "out", run=tmp_path / "run", workload=RecipeConfig(sequences=8), steps=None)
    with pytest.raises(UpcycleError, match=f"cannot express {option.partition('=')[0]}"):
        export_recipe(asked)
    assert not (tmp_path / "out").exists()


def test_a_reward_model_is_refused(text_model: Path, tmp_path: Path) -> None:
    source = checkpoint("mixtral", tmp_path / "moe", tokenizer=text_model)
    edit_json(source / "config.json", lambda config: config.update(architectures=["MixtralForSequenceClassification"]))
    with pytest.raises(SourceError, match=r"cannot take.*mixtral(?s:.*)architectures=\['MixtralForSequenceClass"):
        export_recipe(request(tmp_path / "out", moe=source))


def folding(**degrees: int) -> FoldingConfig:
    return replace(FoldingConfig(tp=1, cp=1, pp=1, etp=1, ep=1), **degrees)


IMPOSSIBLE: dict[str, tuple[str, dict[str, Any], str]] = {
    "neither": ("mixtral", {"moe": None}, "(?s)a run or a MoE checkpoint.*neither"),
    "steps": ("mixtral", {"steps": None}, "needs its length"),
    "no steps": ("mixtral", {"steps": 0}, "steps is out of range"),
    "nodes": ("mixtral", {"nodes": 0}, "nodes is out of range"),
    "ep": ("mixtral", {"parallel": folding(ep=16), "nodes": 2}, "parallel.ep does not divide the experts"),
    "world": ("mixtral", {"parallel": folding(tp=2, cp=3)}, "does not fit the number of GPUs"),
    "batch": ("mixtral", {"workload": RecipeConfig(sequences=3), "parallel": folding()}, "cannot be shared out evenly"),
    "olmoe": ("olmoe", {"parallel": folding(tp=2)}, "TP cannot split"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_what_cannot_be_is_said(sources: dict[str, Path], tmp_path: Path, case: str) -> None:
    model_type, changes, words = IMPOSSIBLE[case]
    with pytest.raises(ConfigError, match=words):
        export_recipe(replace(request(tmp_path / "out", moe=sources[model_type]), **changes))
    assert not list(tmp_path.iterdir())


def test_tp_has_to_divide_the_vocabulary(text_model: Path, tmp_path: Path) -> None:
    source = checkpoint("mixtral", tmp_path / "moe", tokenizer=text_model, vocab_size=301)
    asked = request(tmp_path / "out", moe=source)
    with pytest.raises(ConfigError, match="does not divide the vocabulary"):
        export_recipe(replace(asked, parallel=folding(tp=2)))
    free = FoldingConfig(tp=None, cp=1, pp=1, etp=1, ep=1)
    found = assignments(export_recipe(replace(asked, parallel=free)) / "recipe.py")
    assert found["tensor_model_parallel_size"] == 1


@pytest.mark.parametrize(
    "option",
    [
        "router.noisy_top_k=true",
        "router.release={until: 0.5, then: free}",
        "optim.router_lr=0.5",
        f"balance.z_loss={SCHEDULE}",
        "data.document_attention=true",
    ],
)
def test_training_that_megatron_cannot_express_is_refused(
    text: Path, text_model: Path, tmp_path: Path, option: str
) -> None:
    training.run(training.options(text, tmp_path / "run", f"source='{text_model}'", *MOE_RUN, option))
    asked: ExportConfig = request(tmp_path / "out", run=tmp_path / "run")
    with pytest.raises(UpcycleError, match=f"cannot express {option.partition('=')[0]}"):
        export_recipe(asked)
    assert not (tmp_path / "out").exists()


def test_the_command(sources: dict[str, Path], tmp_path: Path) -> None:
    given = [f"moe={sources['mixtral']}", f"output={tmp_path / 'out'}", "steps=10", "workload.sequences=64"]
    ended = process("export", "format=megatron-bridge", *given, "gpu=h200", "parallel.ep=4", cwd=tmp_path)
    assert ended.status == 0, ended.err
    assert assignments(tmp_path / "out" / "recipe.py")["expert_model_parallel_size"] == 4
    process("export", *given, "overwrite=true", cwd=tmp_path).refused("run=DIR", found="run=null")


def test_the_recipes_names_are_found() -> None:
    """The reader of recipes that the tests above rely on sees assignments and keywords."""
    tree = ast.parse("A = 1\ndef f():\n    p.b = 2\n    g(c=-3)\n")
    assert assignments(tree) == {"A": 1, "b": 2, "c": -3}
