"""What a user expects to find again after a conversion: tokenizer, templates, ids, positions, windows, ties."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import conversions
import models
import pytest
import torch
from conversions import TOLERANCE, assert_lossless, options
from transformers import AutoConfig, AutoModel, AutoTokenizer, GenerationConfig

from upcycle.arch.backbone import layer_windows
from upcycle.models.source import open_source

EXACT = {"router_order": "topk_softmax"}
TARGETS = ("auto", "upcycled_moe")
MESSAGES = [{"role": "user", "content": "parse the argument"}]


def both_targets(source, tmp_path, **changes):
    for target in TARGETS:
        yield conversions.run(options(source, tmp_path / f"moe_{target}", target=target, **EXACT, **changes))


def text_config(directory):
    config = AutoConfig.from_pretrained(directory)
    return getattr(config, "text_config", config)


def changed_config(source, directory, change):
    """A copy of a checkpoint with another config.json."""
    shutil.copytree(source, directory)
    file = directory / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """A Llama with everything that a Hub repository has beside the weights."""
    directory = models.save(models.build("llama", eos_token_id=[2, 5]), tmp_path_factory.mktemp("complete") / "llama")
    models.tokenizer().save_pretrained(directory)
    GenerationConfig(temperature=0.7, do_sample=True, eos_token_id=[2, 5], bos_token_id=1).save_pretrained(directory)
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    (directory / "LICENSE").write_text("Apache-2.0")
    (directory / "README.md").write_text("# the dense model")
    (directory / "training_args.bin").write_bytes(b"not for us")
    return directory


@pytest.mark.parametrize("target", TARGETS)
def test_files_beside_the_weights_are_kept(target, complete, tmp_path):
    done = conversions.run(options(complete, tmp_path / "moe", target=target, **EXACT))
    kept = ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE", "chat_template.jinja"]
    kept += ["additional_chat_templates/tools.jinja"]
    for name in kept:
        assert (done.directory / name).read_bytes() == (complete / name).read_bytes(), name
    assert not (done.directory / "training_args.bin").exists()
    assert (done.directory / "README.md").read_text() != (complete / "README.md").read_text()


@pytest.mark.parametrize("target", TARGETS)
def test_tokenizer_and_chat_template_work_as_before(target, complete, tmp_path):
    done = conversions.run(options(complete, tmp_path / "moe", target=target, **EXACT))
    before, after = (AutoTokenizer.from_pretrained(path) for path in (complete, done.directory))
    text = "class parse: import os"
    assert before(text)["input_ids"] == after(text)["input_ids"] != []
    assert before.special_tokens_map == after.special_tokens_map
    chats = [each.apply_chat_template(MESSAGES, tokenize=False) for each in (before, after)]
    assert chats[0] == chats[1] == "<s>user: parse the argument</s>"


@pytest.mark.parametrize("target", TARGETS)
def test_generation_config_and_special_ids_are_kept(target, complete, tmp_path):
    done = conversions.run(options(complete, tmp_path / "moe", target=target, **EXACT))
    model = conversions.load(done.directory)
    assert model.generation_config.temperature == 0.7
    assert model.generation_config.eos_token_id == [2, 5]
    config = text_config(done.directory)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, [2, 5], 3)


@pytest.mark.parametrize("name", models.MODELS)
def test_facts_of_the_config_are_kept(name, dense, tmp_path):
    before = text_config(dense(name))
    for done in both_targets(dense(name), tmp_path):
        after = text_config(done.directory)
        shared = ("vocab_size", "hidden_size", "num_attention_heads", "num_hidden_layers", "tie_word_embeddings")
        shared += ("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range")
        optional = ("num_key_value_heads", "head_dim", "rope_parameters", "rms_norm_eps", "attention_dropout")
        for field in (*shared, *(field for field in optional if hasattr(before, field))):
            assert getattr(after, field) == getattr(before, field), field
        assert layer_windows(after) == layer_windows(before)


@pytest.mark.parametrize("name", ["llama", "llama_tied", "qwen2", "olmo2_bias", "gemma", "gpt2", "gpt2_untied"])
def test_tied_embeddings_stay_tied_and_untied_ones_untied(name, dense, tmp_path):
    tied = AutoConfig.from_pretrained(dense(name)).tie_word_embeddings
    for done in both_targets(dense(name), tmp_path):
        model = conversions.load(done.directory)
        assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
        heads = [key for key in conversions.read_tensors(done.directory) if key.endswith("lm_head.weight")]
        copies = [tensor.name for tensor in done.plan.tensors if tensor.kind == "copy"]
        assert len(heads) == (len(copies) if tied else 1)
        assert len(copies) == (tied and done.plan.target == "qwen2_moe")


def test_a_tied_head_that_is_stored_is_dropped_and_said_so(dense, dense_outputs, tmp_path):
    source = tmp_path / "dense"
    shutil.copytree(dense("llama_tied"), source)
    conversions.edit(source, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    done = conversions.run(options(source, tmp_path / "moe", **EXACT))
    assert done.plan.dropped == {"lm_head.weight": "tied to the embedding"}
    assert_lossless(done.directory, dense_outputs("llama_tied"), TOLERANCE["topk_softmax"])


@pytest.mark.parametrize(
    ("name", "buffer"),
    [("qwen2", "model.layers.0.self_attn.rotary_emb.inv_freq"), ("gpt2", "transformer.h.1.attn.masked_bias")],
)
def test_buffers_of_old_checkpoints_are_left_out_and_said_so(name, buffer, dense, dense_outputs, tmp_path):
    source = models.save(models.build(name), tmp_path / "dense")
    conversions.edit(source, lambda tensors: tensors.update({buffer: torch.ones(4)}))
    done = conversions.run(options(source, tmp_path / "moe", **EXACT))
    assert done.plan.dropped == {buffer: "a buffer that the model computes anew"}
    assert_lossless(done.directory, dense_outputs(name), TOLERANCE["topk_softmax"])


@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "gemma3"])
def test_a_base_model_saved_without_its_head_is_read(name, dense, dense_outputs, tmp_path):
    """Names lack their prefix then, as in the first GPT-2 checkpoints."""
    AutoModel.from_pretrained(dense(name)).save_pretrained(tmp_path / "base")
    names = conversions.read_tensors(tmp_path / "base")
    assert not any(key.startswith(("model.", "transformer.")) for key in names)
    done = conversions.run(options(tmp_path / "base", tmp_path / "moe", **EXACT))
    assert_lossless(done.directory, dense_outputs(name), TOLERANCE["topk_softmax"])


LEGACY_ROPES = {
    "theta": {"rope_theta": 5000.0, "rope_scaling": None},
    "linear": {"rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "dynamic": {"rope_theta": 5000.0, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "llama3": {"rope_theta": 1000.0, "rope_scaling": {k: v for k, v in models.LLAMA3.items() if k != "rope_theta"}},
    "yarn": {"rope_theta": 1000.0, "rope_scaling": {k: v for k, v in models.YARN.items() if k != "rope_theta"}},
}
OLD_CONFIGS = [(name, rope) for name in ("llama", "mistral", "qwen2", "qwen3", "olmo2") for rope in LEGACY_ROPES]
OLD_CONFIGS += [("phi3", "theta")]  # Phi-3 knows no other scaling than longrope, which is a model of the table


@pytest.mark.parametrize(("name", "rope"), OLD_CONFIGS)
def test_rotary_settings_of_old_configs_are_kept(name, rope, dense, dense_outputs, tmp_path):
    def old(config):
        del config["rope_parameters"]
        config["torch_dtype"] = config.pop("dtype")
        config.update(LEGACY_ROPES[rope])

    source = changed_config(dense(name), tmp_path / "dense", old)
    expected = conversions.outputs(source)
    assert float((expected["logits"] - dense_outputs(name)["logits"]).abs().max()) > 1e-3  # the setting matters
    for done in both_targets(source, tmp_path):
        assert text_config(done.directory).rope_parameters == text_config(source).rope_parameters
        assert_lossless(done.directory, expected, TOLERANCE["topk_softmax"])


@pytest.mark.parametrize("name", ["mistral", "qwen2_windows", "qwen3_windows", "gemma3", "phi3_windows"])
def test_windows_matter_to_these_tests(name, dense, dense_outputs, tmp_path):
    """Without its window the same model computes something else on the test sequences."""

    def widen(config):
        config["sliding_window"] = models.POSITIONS

    source = changed_config(dense(name), tmp_path / "dense", widen)
    difference = conversions.outputs(source)["logits"] - dense_outputs(name)["logits"]
    assert float(difference.abs().max()) > 1e-2


@pytest.mark.parametrize("name", models.MODELS)
def test_greedy_generation_with_a_cache_is_that_of_the_dense_model(name, dense, tmp_path):
    def generate(directory):
        arguments = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 3}
        with torch.inference_mode():
            return conversions.load(directory).generate(models.token_ids()[:1], **arguments)

    expected = generate(dense(name))
    for done in both_targets(dense(name), tmp_path):
        assert torch.equal(generate(done.directory), expected)


def test_the_output_is_no_source(dense, tmp_path):
    done = conversions.run(options(dense("llama"), tmp_path / "moe"))
    with pytest.raises(ValueError, match="already a mixture of experts"):
        open_source(str(done.directory))


WITHOUT_UPCYCLE = """
import sys
sys.modules["upcycle"] = None
import torch
from transformers import AutoModelForCausalLM
ids, *directories = sys.argv[1:]
for directory in directories:
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, experts_implementation="eager")
    with torch.inference_mode():
        torch.save(model(torch.load(ids)).logits, directory + "/logits.pt")
"""


def test_outputs_load_where_upcycle_is_not_installed(dense, dense_outputs, tmp_path):
    torch.save(models.token_ids(), tmp_path / "ids.pt")
    done = list(both_targets(dense("phi3"), tmp_path))
    arguments = [str(tmp_path / "ids.pt"), *(str(each.directory) for each in done)]
    subprocess.run(
        [sys.executable, "-I", "-W", "error", "-c", WITHOUT_UPCYCLE, *arguments],
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    assert [each.plan.target for each in done] == ["mixtral", "upcycled_moe"]
    for each in done:
        difference = torch.load(each.directory / "logits.pt") - dense_outputs("phi3")["logits"]
        assert float(difference.abs().max()) <= TOLERANCE["topk_softmax"]
