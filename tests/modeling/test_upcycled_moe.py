"""The `upcycled_moe` model against the dense models it is made from, and its experts against a slow reference."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.activations import ACT2FN
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from upcycle.modeling import REMOTE_CODE_FILES
from upcycle.modeling.configuration_upcycled_moe import UpcycledMoeConfig
from upcycle.modeling.modeling_upcycled_moe import UpcycledMoeForCausalLM, UpcycledMoeSparseMoeBlock
from upcycle.modeling.register import register_config, register_model

pytestmark = pytest.mark.filterwarnings("error")

TOLERANCE = {"rtol": 0, "atol": 1e-5}  # float32 logits of order 1; the same sums in another order
HIDDEN, WIDTH, VOCAB, WINDOW = 32, 24, 61, 4  # prompts are longer than the sliding window
TINY = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GEMMA = {"head_dim": 8, "sliding_window": WINDOW}
FAMILIES = {
    "llama": {"mlp_bias": True, "tie_word_embeddings": True},
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "qwen3": {"head_dim": 8},
    "olmo": {"clip_qkv": 1.0},
    "olmo2": {},
    "gemma": {"head_dim": 8},
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "phi3": {},
    "gpt2": {"n_inner": WIDTH},
    "nemotron": {"mlp_bias": True},
}


def dense_model(family: str, **changes: object) -> torch.nn.Module:
    """A tiny dense model in which no bias is 0 and no norm is 1."""
    tiny = {k: v for k, v in TINY.items() if family != "gpt2" or k not in {"intermediate_size", "num_key_value_heads"}}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **tiny, **FAMILIES[family], **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def moe_config(dense: torch.nn.Module, **changes: object) -> UpcycledMoeConfig:
    text = dense.config
    gpt2 = text.model_type == "gpt2"
    fields = {
        "text_config": text.to_dict(),
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": WIDTH,
        "moe_layers": [0, 1],
        "ffn_path": "transformer.h.{layer}.mlp" if gpt2 else "model.layers.{layer}.mlp",
        "gated": text.model_type not in {"gpt2", "nemotron"},
        "hidden_act": getattr(text, "activation_function" if gpt2 else "hidden_act", None) or text.hidden_activation,
        "ffn_bias": gpt2 or getattr(text, "mlp_bias", False),
        "ffn_dropout": text.resid_pdrop if gpt2 else 0.0,
        "expansion": 2,
    }
    return UpcycledMoeConfig(**fields | changes)


def dense_ffn(ffn: torch.nn.Module, family: str) -> dict[str, torch.Tensor]:
    """The dense FFN's tensors under the experts' names, for one expert."""
    if family == "gpt2":
        up, down = (copy.deepcopy(ffn.c_fc), copy.deepcopy(ffn.c_proj))
        up.weight, down.weight = (torch.nn.Parameter(m.weight.T) for m in (up, down))
        ups, name = [up], "up_proj"
    elif family == "phi3":
        ups, down, name = [ffn.gate_up_proj], ffn.down_proj, "gate_up_proj"
    elif family == "nemotron":
        ups, down, name = [ffn.up_proj], ffn.down_proj, "up_proj"
    else:
        ups, down, name = [ffn.gate_proj, ffn.up_proj], ffn.down_proj, "gate_up_proj"
    tensors = {name: torch.cat([m.weight for m in ups]), "down_proj": down.weight}
    if down.bias is not None:
        tensors |= {f"{name}_bias": torch.cat([m.bias for m in ups]), "down_proj_bias": down.bias}
    return tensors


def upcycled(family: str, **changes: object) -> tuple[torch.nn.Module, UpcycledMoeForCausalLM]:
    """A dense model and its conversion into two whole copies of each FFN, of which each token visits one."""
    dense = dense_model(family, **changes)
    moe = UpcycledMoeForCausalLM(moe_config(dense)).eval()
    loaded = moe.language_model.load_state_dict(dense.state_dict(), strict=False)
    assert all(".mlp." in key for key in loaded.missing_keys + loaded.unexpected_keys)
    for layer, block in enumerate(moe.moe_blocks):
        ffn = dense.get_submodule(moe.config.ffn_path.format(layer=layer))
        for name, tensor in dense_ffn(ffn, family).items():
            block.experts.get_parameter(name).data.copy_(tensor.expand(2, *tensor.shape))
    return dense, moe


def prompt() -> torch.Tensor:
    return torch.randint(2, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest) -> tuple[torch.nn.Module, UpcycledMoeForCausalLM]:
    return upcycled(request.param)


@pytest.fixture
def llama() -> UpcycledMoeForCausalLM:
    """A Llama with four biased experts, top-2, and router weights that spread tokens unevenly."""
    torch.manual_seed(0)
    config = moe_config(dense_model("llama"), num_experts=4, num_experts_per_tok=2, shared_expert_intermediate_size=8)
    return UpcycledMoeForCausalLM(config).eval()


@torch.no_grad()
def test_copies_of_the_dense_ffn_give_the_dense_logits(pair):
    dense, moe = pair
    expected = dense(prompt()).logits
    torch.testing.assert_close(moe(prompt()).logits, expected, **TOLERANCE)
    mutant = copy.deepcopy(moe)
    mutant.moe_blocks[1].experts.down_proj[0] *= 1.1
    assert not torch.allclose(mutant(prompt()).logits, expected, **TOLERANCE)


@torch.no_grad()
def test_cached_generation_equals_uncached_and_dense(pair):
    dense, moe = pair
    arguments = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(prompt())}
    cached = moe.generate(prompt(), **arguments)
    assert torch.equal(cached, moe.generate(prompt(), use_cache=False, **arguments))
    assert torch.equal(cached, dense.generate(prompt(), **arguments))


@torch.no_grad()
def test_generation_follows_phi3_when_its_rotary_factors_change():
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [40.0, 30.0, 20.0, 9.0],
    }
    dense, moe = upcycled("phi3", rope_parameters=rope, original_max_position_embeddings=12)
    arguments = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    ours, theirs = (m.generate(prompt(), attention_mask=torch.ones_like(prompt()), **arguments) for m in (moe, dense))
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(theirs.logits), **TOLERANCE)


@torch.no_grad()
def test_saving_and_loading_is_exact(pair, tmp_path):
    dense, moe = pair
    moe.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is UpcycledMoeForCausalLM
    assert not any(info.values())
    assert loaded.state_dict().keys() == moe.state_dict().keys()
    assert all(torch.equal(tensor, moe.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    # safetensors maps weights at addresses that other GEMM kernels serve (4e-7 off); a copy is aligned as `moe` is.
    assert torch.equal(copy.deepcopy(loaded)(prompt()).logits, moe(prompt()).logits)
    tied = loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    assert tied == loaded.config.tie_word_embeddings == dense.config.tie_word_embeddings


LOAD_WITHOUT_UPCYCLE = """
import copy, sys
sys.modules["upcycle"] = None
import torch
from transformers import AutoModelForCausalLM
source, target = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model)
assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
ids = torch.load(f"{source}/ids.pt")
torch.save(copy.deepcopy(model)(ids).logits, f"{source}/logits.pt")
model.save_pretrained(target)
"""


@torch.no_grad()
def test_a_saved_model_loads_where_upcycle_is_not_installed(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    _, moe = upcycled("gpt2")
    moe.save_pretrained(source)
    torch.save(prompt(), source / "ids.pt")
    subprocess.run(
        [sys.executable, "-I", "-W", "error", "-c", LOAD_WITHOUT_UPCYCLE, str(source), str(target)],
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        check=True,
    )
    # Another process may use another number of threads, and so another order of sums.
    torch.testing.assert_close(torch.load(source / "logits.pt"), moe(prompt()).logits, rtol=0, atol=1e-5)
    for file in REMOTE_CODE_FILES:
        assert file.read_bytes() == (source / file.name).read_bytes() == (target / file.name).read_bytes()


def test_registering_twice_is_harmless():
    for register in (register_config, register_model) * 2:
        register()
    assert AutoConfig.for_model(**moe_config(dense_model("llama")).to_dict()).granularity == 1
    assert AutoModelForCausalLM._model_mapping[UpcycledMoeConfig] is UpcycledMoeForCausalLM


def test_a_model_of_transformers_may_be_imported_after_upcycle():
    code = "import upcycle, transformers.models.qwen2_moe.modeling_qwen2_moe"
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)


def test_remote_code_imports_only_torch_transformers_and_the_standard_library():
    allowed = {"torch", "transformers"} | {file.stem for file in REMOTE_CODE_FILES} | sys.stdlib_module_names
    for file in REMOTE_CODE_FILES:
        lines = [line.split()[1] for line in file.read_text().splitlines() if line.startswith(("import ", "from "))]
        assert {name.lstrip(".").split(".")[0] for name in lines} <= allowed


def reference(block: UpcycledMoeSparseMoeBlock, x: torch.Tensor, config: UpcycledMoeConfig) -> torch.Tensor:
    """Every expert on every token, weighted by a [T, N] matrix."""
    logits = x @ block.gate.weight.T
    kept = torch.zeros_like(logits).scatter(1, logits.topk(config.num_experts_per_tok).indices, 1.0).bool()
    if config.router_order == "softmax_topk":
        weights = logits.softmax(-1) * kept
    else:
        weights = logits.masked_fill(~kept, float("-inf")).softmax(-1)
    up = "gate_up_proj" if config.gated else "up_proj"
    h = torch.einsum("th,nih->nti", x, block.experts.get_parameter(up))
    h = h + block.experts.get_parameter(f"{up}_bias")[:, None] if config.ffn_bias else h
    act = ACT2FN[config.hidden_act]
    h = act(h[..., :WIDTH]) * h[..., WIDTH:] if config.gated else act(h)
    y = torch.einsum("nti,nhi->nth", h, block.experts.down_proj)
    y = y + block.experts.down_proj_bias[:, None] if config.ffn_bias else y
    y = torch.einsum("nth,tn->th", y, weights)
    if config.shared_expert_intermediate_size:
        shared = block.shared_expert
        up = F.linear(x, shared.up_proj.weight, shared.up_proj.bias)
        gate = F.linear(x, shared.gate_proj.weight, shared.gate_proj.bias) if config.gated else None
        h = act(up) if gate is None else act(gate) * up
        y = y + F.linear(h, shared.down_proj.weight, shared.down_proj.bias)
    return y


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("shared", [0, 12])
@pytest.mark.parametrize("order", ["softmax_topk", "topk_softmax"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_block_matches_the_reference_in_outputs_and_gradients(gated, bias, order, shared, implementation):
    config = moe_config(
        dense_model("olmo2"),
        num_experts=5,
        num_experts_per_tok=2,
        gated=gated,
        ffn_bias=bias,
        router_order=order,
        shared_expert_intermediate_size=shared,
    )
    config._experts_implementation = implementation
    torch.manual_seed(0)
    block = UpcycledMoeSparseMoeBlock(config)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.rand(2, 7, HIDDEN)
    block.gate.weight.data[3] = -10.0  # x > 0, so no token visits expert 3
    assert 3 not in block.gate(x.flatten(0, 1))[2]

    leaves = (x.requires_grad_(), *block.parameters())
    expected, output = reference(block, x.flatten(0, 1), config).view_as(x), block(x)
    direction = torch.randn_like(output)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(
        torch.autograd.grad((output * direction).sum(), leaves),
        torch.autograd.grad((expected * direction).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_implementations_can_be_chosen_at_load_and_changed_later(llama, tmp_path):
    llama.save_pretrained(tmp_path)
    eager = {"experts_implementation": "eager", "attn_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path, **eager)
    expected = model(prompt()).logits
    for name in ("grouped_mm", "batched_mm"):
        chosen = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation=name)
        model.set_experts_implementation(name)
        assert model.config._experts_implementation == chosen.config._experts_implementation == name
        torch.testing.assert_close(chosen(prompt()).logits, expected, **TOLERANCE)
        torch.testing.assert_close(model(prompt()).logits, expected, **TOLERANCE)
    model.set_attn_implementation("sdpa")
    assert model.language_model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(model(prompt()).logits, expected, **TOLERANCE)


def test_router_logits_are_float32_whatever_the_dtype(llama, tmp_path):
    llama.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert model.dtype == model.moe_blocks[0].experts.down_proj.dtype == torch.bfloat16
    output = model(prompt(), output_router_logits=True)
    assert output.logits.dtype == torch.bfloat16
    assert [logits.dtype for logits in output.router_logits] == [torch.float32] * 2

    router, x = llama.moe_blocks[0].gate, torch.randn(5, HIDDEN)
    expected = router(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for ours, theirs in zip(router(x), expected, strict=True):
            assert torch.equal(ours, theirs)
    assert router(x.bfloat16())[1].dtype == torch.bfloat16


def test_load_balancing_loss_is_added_and_ignores_padding(llama):
    mask = torch.ones_like(prompt())
    mask[0, :4] = 0
    plain = llama(prompt(), attention_mask=mask, labels=prompt())
    assert plain.router_logits is None
    output = llama(prompt(), attention_mask=mask, labels=prompt(), output_router_logits=True)
    assert [logits.shape for logits in output.router_logits] == [(18, 4)] * 2
    assert not any(block.gate._forward_hooks for block in llama.moe_blocks)
    torch.testing.assert_close(output.aux_loss, load_balancing_loss_func(output.router_logits, 4, 2, mask))
    torch.testing.assert_close(output.loss, plain.loss + llama.config.router_aux_loss_coef * output.aux_loss)

    llama.config.output_router_logits = True
    assert llama.generate(prompt(), attention_mask=mask, max_new_tokens=2).shape == (2, 11)
    as_tuple = llama(prompt(), return_dict=False)
    assert torch.equal(as_tuple[1], llama(prompt()).logits)


def test_gradient_checkpointing_gives_the_same_gradients(llama):
    def gradients() -> list[torch.Tensor]:
        llama.zero_grad()
        llama(prompt(), labels=prompt(), output_router_logits=True, use_cache=False).loss.backward()
        return [parameter.grad.clone() for parameter in llama.parameters()]

    llama.config.router_aux_loss_coef = 1.0
    llama.train()
    expected = gradients()
    llama.activation_checkpointing_enable()
    assert llama.language_model.model.layers[0].gradient_checkpointing
    for ours, theirs in zip(gradients(), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_a_model_from_a_config_has_the_dense_initialisation(llama):
    experts, gate = llama.moe_blocks[0].experts, llama.moe_blocks[0].gate
    for weight in (experts.gate_up_proj, experts.down_proj, gate.weight):
        assert abs(weight.std().item() / TINY["initializer_range"] - 1) < 0.2
    assert not experts.gate_up_proj_bias.any()
    bfloat16 = AutoConfig.for_model(**llama.config.text_config.to_dict() | {"dtype": "bfloat16"})
    mixed = UpcycledMoeForCausalLM(moe_config(dense_model("llama"), text_config=bfloat16))
    assert {parameter.dtype for parameter in mixed.parameters()} == {torch.float32}


def test_only_what_a_checkpoint_lacks_is_initialised(llama):
    state = llama.state_dict()
    lacking = {name: state.pop(name) for name in list(state) if "layers.1.mlp.experts" in name or "gate.weight" in name}
    loaded = UpcycledMoeForCausalLM.from_pretrained(None, config=llama.config, state_dict=state).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    assert all(loaded[name].isfinite().all() for name in lacking)
    std = loaded["language_model.model.layers.1.mlp.experts.down_proj"].std().item()
    assert abs(std / TINY["initializer_range"] - 1) < 0.2


@torch.no_grad()
def test_other_layers_stay_dense_and_embeddings_can_be_resized():
    dense = dense_model("llama")
    moe = UpcycledMoeForCausalLM(moe_config(dense, moe_layers=[1]))
    assert type(moe.language_model.model.layers[0].mlp) is type(dense.model.layers[0].mlp)
    assert moe.moe_blocks == [moe.language_model.model.layers[1].mlp]
    assert moe.get_decoder() is moe.language_model.model
    moe.resize_token_embeddings(VOCAB + 3, mean_resizing=False)
    assert moe(prompt()).logits.shape[-1] == VOCAB + 3
    assert moe.get_input_embeddings().weight is moe.get_output_embeddings().weight


def test_dropout_acts_in_training_only():
    block = UpcycledMoeSparseMoeBlock(moe_config(dense_model("gpt2"), ffn_dropout=0.5))
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(64, HIDDEN)
    assert 0.4 < (block(x) == 0).float().mean() < 0.6
    assert block.eval()(x).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_config_survives_a_round_trip(family, tmp_path):
    config = moe_config(dense_model(family))
    assert config.get_text_config().model_type == family
    config.to_json_file(tmp_path / "config.json")
    for copied in (UpcycledMoeConfig.from_dict(config.to_dict()), UpcycledMoeConfig.from_pretrained(Path(tmp_path))):
        assert copied.to_dict() == config.to_dict()
        assert type(copied.text_config) is type(config.text_config)


def test_the_first_checkpoints_choose_as_they_did():
    fields = moe_config(dense_model("llama"), granularity=2, num_experts_per_tok=2).to_dict()
    del fields["groups"]
    for select_groups, groups in ((True, "whole"), (False, "free")):
        config = UpcycledMoeConfig.from_dict({**fields, "select_groups": select_groups})
        assert config.groups == groups
        assert "select_groups" not in config.to_dict()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"router_order": "softmax"}, "router_order must be one of"),
        ({"num_experts_per_tok": 3}, "between 1 and num_experts = 2, found 3"),
        ({"groups": "whole", "granularity": 2}, "divisible by granularity = 2, found 2 and 1"),
        ({"groups": "some"}, "groups must be one of"),
    ],
)
def test_impossible_routing_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        moe_config(dense_model("llama"), **changes)


def test_a_wrong_ffn_path_is_refused():
    with pytest.raises(AttributeError, match="block_sparse_moe"):
        UpcycledMoeForCausalLM(moe_config(dense_model("llama"), ffn_path="model.layers.{layer}.block_sparse_moe"))
