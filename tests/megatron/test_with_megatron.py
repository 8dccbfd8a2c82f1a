"""Recipes with the real packages, which `make test` and `make test-megatron` put into a directory of their own.

Types are checked against the packages' signatures. `in_megatron.py` builds the configurations, and runs the models, on
a CPU with empty modules for Transformer Engine and the like (`without_gpu.py`). Of hybrids it runs Megatron-Core's own
Mamba-2 layer, in which `mamba_on_cpu.py` stands for the kernels.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import conversions
import models
import pytest
import training
import without_gpu
from recipes import EXPERTS, TYPES, WITHOUT_KERNELS, checkpoint, request, with_mixture
from transformers import AutoTokenizer

from upcycle.megatron.export import export_recipe
from upcycle.megatron.support import BRIDGE, CORE, TRANSFORMERS
from upcycle.parallel.config import FoldingConfig
from upcycle.train.config import RecipeConfig

pytest_plugins = ("text_model",)
PACKAGES = os.environ.get("MEGATRON_PACKAGES", "")
SCRIPTS = [str(Path(__file__).with_name(name)) for name in ("without_gpu.py", "in_megatron.py")]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "DATA"} | {"PYTHONPATH": PACKAGES}
READ = """import json, sys
from megatron.core.datasets.indexed_dataset import IndexedDataset
print(json.dumps([[tokens.tolist() for tokens in IndexedDataset(prefix)] for prefix in sys.argv[1:]]))"""
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PACKAGES, reason="MEGATRON_PACKAGES names no directory with megatron-bridge"),
]


def hybrids(root: Path, text_model: Path) -> dict[str, Path]:
    """More mixtures: what this library makes of a dense hybrid, and one that chooses experts from groups of them."""
    dense = root / "dense"
    models.save(models.build("nemotron_h", vocab_size=300, **WITHOUT_KERNELS), dense)
    for file in text_model.glob("tokenizer*"):
        shutil.copy(file, dense)
    router = {
        "router_order": "auto",
        "router_std": 0.02,
    }  # at conversions.ROUTER_STD sigmoids of two groups may be equal
    asked = conversions.options(dense, root / "converted-source", target="nemotron_h", **router)
    limits = {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 4, "moe_latent_size": None}
    return {
        "converted": conversions.run(asked).directory,
        "limited": checkpoint("nemotron_h", root / "limited-source", tokenizer=text_model, **limits),
    }


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory, text_model: Path, text: Path) -> dict[str, Path]:
    """A recipe for 8 GPUs of a checkpoint of every type, and one of a run with options that are not the default."""
    root = tmp_path_factory.mktemp("recipes")
    found = {}
    for name in TYPES:
        source = checkpoint(name, root / f"{name}-source", tokenizer=text_model)
        folding = FoldingConfig(tp=1 if name == "olmoe" else 2, cp=1, pp=2, etp=1, ep=4)
        found[name] = export_recipe(request(root / name, moe=source, parallel=folding))
    for name, source in hybrids(root, text_model).items():
        found[name] = export_recipe(request(root / name, moe=source))
    changes = ["balance.statistics=global_batch", "optim.clip=null"]
    changes += ["schedule=wsd", "schedule.peak=1e-2", "schedule.warmup=2", "schedule.decay=3"]
    moe = ["model=upcycle", *training.SMALL_MOE, "target=mixtral", "moe.router_order=topk_softmax"]
    options = training.options(text, root / "source", f"source='{text_model}'", *moe, *changes)
    training.run(with_mixture(options, text, held_out=0))
    workload = RecipeConfig(sequences=8)
    found["run"] = export_recipe(request(root / "run", run=root / "source", workload=workload, steps=None))
    return found


@pytest.fixture(scope="module")
def report(recipes: dict[str, Path]) -> dict[str, Any]:
    """What in_megatron.py says of every recipe."""
    command = [sys.executable, *SCRIPTS, *map(str, recipes.values())]
    ended = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


def test_the_packages_are_those_of_the_recipes(recipes: dict[str, Path]) -> None:
    installed = {metadata.name for metadata in Path(PACKAGES).glob("*.dist-info")}
    names = {"megatron_bridge": BRIDGE, "megatron_core": CORE, "transformers": TRANSFORMERS}
    assert {f"{name}-{version}.dist-info" for name, version in names.items()} <= installed
    pinned = (recipes["mixtral"] / "requirements.txt").read_text()
    assert all(f"{name.replace('_', '-')}=={version}\n" in pinned for name, version in names.items())
    assert f"transformer-engine[core_cu13,pytorch]=={without_gpu.VERSION}\n" in pinned


def objections(directory: Path) -> list[str]:
    """What mypy says of a recipe's files, with the signatures of Megatron-Bridge and -Core."""
    settings = directory.parent / "mypy.ini"
    settings.write_text(
        f"[mypy]\ncache_dir = {directory.parent}/cache\npython_version = 3.12\nignore_missing_imports = true\n"
        "[mypy-torch.*,transformers.*]\nfollow_imports = skip\n"
    )
    files = sorted(file.name for file in directory.glob("*.py"))
    ended = subprocess.run(
        [sys.executable, "-m", "mypy", f"--config-file={settings}", *files],
        cwd=directory,
        env={**os.environ, "MYPYPATH": PACKAGES},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode in (0, 1), ended.stderr
    return [line for line in ended.stdout.splitlines() if line.startswith(tuple(f"{file}:" for file in files))]


@pytest.mark.parametrize("model_type", TYPES)
def test_the_types_are_the_packages(recipes: dict[str, Path], model_type: str) -> None:
    assert objections(recipes[model_type]) == []


def test_a_wrong_name_or_type_is_noticed(recipes: dict[str, Path]) -> None:
    """The mutants of the test above."""
    file = recipes["mixtral"] / "recipe.py"
    text = file.read_text()
    name, coefficient = "global_batch_size=", "moe_aux_loss_coeff = "
    assert (text.count(name), text.count(coefficient)) == (1, 1)
    try:
        file.write_text(text.replace(name, "batch_size_global=").replace(coefficient, f'{coefficient}"much" or '))
        lines = {int(line.split(":")[1]) for line in objections(recipes["mixtral"])}
    finally:
        file.write_text(text)
    wrong = [number for number, line in enumerate(text.splitlines(), start=1) if coefficient in line]
    call = next(number for number, line in enumerate(text.splitlines(), start=1) if "train=TrainingConfig(" in line)
    assert lines == {call, *wrong}


@pytest.mark.parametrize("model_type", TYPES)
def test_the_configuration_of_a_checkpoint(report: dict[str, Any], model_type: str) -> None:
    """Megatron has completed it and let it pass; sizes and degrees are the request's, the rest upcycle train's."""
    found = report[model_type]
    tp = 1 if model_type == "olmoe" else 2
    assert found["degrees"] == [tp, 1, 2, 1, 4, 8 // (2 * tp)]  # the last is DP
    hybrid = model_type == "nemotron_h"
    assert found["pattern"] == ("ME*E-M" if hybrid else None)
    assert found["model"] == {
        "num_moe_experts": EXPERTS,
        "moe_router_topk": 2,
        "moe_ffn_hidden_size": 12 if model_type in ("qwen3_moe", "nemotron_h") else 24,
        "moe_shared_expert_intermediate_size": 20 if hybrid else None,
        "moe_latent_size": 16 if hybrid else None,
        "gated_linear_unit": not hybrid,
        "num_layers": 6 if hybrid else 2,
        "moe_router_score_function": "sigmoid" if hybrid else "softmax",
        "moe_router_topk_scaling_factor": 2.5 if hybrid else None,
        "moe_router_enable_expert_bias": hybrid,
        "moe_router_bias_update_rate": 0.0,
        "moe_router_num_groups": 1 if hybrid else None,
        "moe_router_group_topk": 1 if hybrid else None,
        "moe_router_pre_softmax": model_type == "olmoe",
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 0.005,  # two layers with experts, whose losses Megatron adds up
        "moe_router_dtype": "fp32",
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "bf16": True,
        "seq_length": 1024,
    }
    assert found["train"] == {"train_iters": 10, "global_batch_size": 64, "micro_batch_size": 1}
    assert found["optimizer"] == {
        "optimizer": "adam",
        "lr": 2e-4,
        "min_lr": 2e-5,
        "weight_decay": 0.1,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "adam_eps": 1e-8,
        "clip_grad": 1.0,
        "bf16": True,
    }
    # Megatron counts samples: steps of 64 sequences.
    steps = {"lr_warmup_steps": 0, "lr_decay_steps": 640, "wsd_decay_steps": None}
    assert found["scheduler"] == {"lr_decay_style": "cosine", **steps}
    assert found["validation"] == {"eval_interval": 200, "eval_iters": 1}
    assert found["dataset"]["blend_per_split"] == [[["data"], [1.0]], [["data-held-out"], [1.0]], None]


def test_the_configuration_of_a_run(report: dict[str, Any]) -> None:
    found = report["run"]
    assert found["train"] == {"train_iters": 6, "global_batch_size": 8, "micro_batch_size": 2}
    assert found["model"]["moe_router_load_balancing_type"] == "global_aux_loss"
    assert found["optimizer"]["lr"] == 1e-2
    assert found["optimizer"]["clip_grad"] == 0
    steps = {"lr_warmup_steps": 2 * 8, "lr_decay_steps": 6 * 8, "wsd_decay_steps": 3 * 8}
    assert found["scheduler"] == {"lr_decay_style": "WSD", **steps}
    assert found["validation"]["eval_iters"] == 0
    assert found["dataset"]["blend_per_split"] == [[["code", "rest"], [3.0, 0.5]], None, None]


def test_the_configuration_of_a_conversion(report: dict[str, Any]) -> None:
    found = report["converted"]
    assert found["pattern"] == "ME*E"
    expected = {"num_moe_experts": 8, "moe_router_topk": 2, "moe_router_topk_scaling_factor": 2.0}
    expected |= {"moe_shared_expert_intermediate_size": 1, "moe_latent_size": None}
    assert {name: found["model"][name] for name in expected} == expected
    assert found["degrees"][0] == 1  # nothing divides a shared expert of one neuron


@pytest.mark.parametrize("name", [*TYPES, "limited", "converted"])
def test_the_loaded_weights_give_the_logits_of_transformers(report: dict[str, Any], name: str) -> None:
    """5e-6 was seen, of logits up to 5; and the mutants are far off."""
    found = report[name]
    assert found["largest"] > 1
    assert found["off"] < 2e-5
    if name != "converted":  # whose biases are 0, and experts of a group alike
        assert min(found["mutants"].values()) > 0.1, found["mutants"]


@pytest.mark.parametrize("name", [*TYPES, "limited", "converted"])
def test_the_weights_come_back_bit_for_bit(report: dict[str, Any], name: str) -> None:
    assert report[name]["differing_back"] == []


def test_the_tokens_are_what_megatron_reads(recipes: dict[str, Path], tmp_path: Path) -> None:
    texts = [f"def f{number}(): pass" for number in range(24)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    call = {"env": ENVIRONMENT, "check": True, "capture_output": True, "text": True}
    script = recipes["qwen3_moe"] / "tokenize_data.py"
    subprocess.run([sys.executable, str(script), str(tmp_path / "text.jsonl"), str(tmp_path / "text")], **call)
    prefixes = [str(tmp_path / name) for name in ("text", "text-held-out")]
    ended = subprocess.run([sys.executable, "-c", READ, *prefixes], **call)
    training, held_out = json.loads(ended.stdout.splitlines()[-1])
    assert (len(training), len(held_out)) == (4, 20)
    tokenizer = AutoTokenizer.from_pretrained(recipes["qwen3_moe"])
    expected = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    assert sorted([*training, *held_out]) == sorted(expected)
