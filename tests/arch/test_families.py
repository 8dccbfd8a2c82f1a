"""The tables of tensor names and shapes against transformers' own models, with every flag on and off."""

from __future__ import annotations

from itertools import product

import models
import pytest
import torch
from conversions import described
from transformers import AutoModelForCausalLM

from upcycle.arch.families import FAMILIES

FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_bias", "use_conv_bias")
STORED = {"nemotron_h": ("model.", "backbone.")}  # where tensors on disk begin otherwise than in memory


def test_every_family_has_a_model_in_the_table():
    assert {fields["model_type"] for fields in models.MODELS.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", models.MODELS)
def test_tensors_are_those_of_transformers(name):
    flags = [flag for flag in FLAGS if hasattr(models.config(name), flag)]
    for values in product((False, True), repeat=len(flags)):
        changes = dict(zip(flags, values, strict=True))
        with torch.device("meta"):
            whole = AutoModelForCausalLM.from_config(models.config(name, **changes))
        real = whole.state_dict()
        if whole.get_input_embeddings().weight is whole.get_output_embeddings().weight:
            del real["lm_head.weight"]
        found = described(name, **changes).tensors()
        here, stored = STORED.get(models.MODELS[name]["model_type"], ("", ""))
        names = {key: stored + key.removeprefix(here) if key.startswith(here) else key for key in real}
        assert found == {names[key]: tuple(tensor.shape) for key, tensor in real.items()}, changes


@pytest.mark.parametrize("name", models.MODELS)
def test_ffn_tensors_are_where_the_matrices_are(name):
    model = described(name)
    fused, transposed = model.family.ffn.fused, model.family.ffn.transposed
    for role in model.family.ffn.roles:
        into, out = (models.WIDTH, models.HIDDEN) if role == "down" else (models.HIDDEN, models.WIDTH)
        rows = 2 * out if fused and role != "down" else out
        assert model.tensors()[model.ffn_tensor(model.ffn_layers[-1], role)] == (
            (into, rows) if transposed else (rows, into)
        )


@pytest.mark.parametrize(
    ("name", "windows"),
    [
        ("llama", (0, 0)),
        ("mistral", (4, 4)),
        ("mistral_full", (0, 0)),
        ("qwen2", (0, 0)),
        ("qwen2_windows", (0, 4)),
        ("qwen3_windows", (4, 4)),
        ("gemma2", (4, 0)),
        ("gemma3", (4, 0)),
        ("phi3_windows", (4, 4)),
    ],
)
def test_sliding_windows_by_layer(name, windows):
    assert described(name).backbone.windows == windows
