"""Every bad input ends with a message that says what, found, expected and remedy, and leaves no file behind."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import socket
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
import torch
from cli import INDEX, SMALL, Outcome, add_tensor, contents, edit_json, edit_tensor, process, remove_tensor
from safetensors.torch import load_file

from upcycle.checkpoint import Staging
from upcycle.files import durable as file_operations

if TYPE_CHECKING:
    from collections.abc import Callable

pytest_plugins = ["tiny"]

GATE = "model.layers.1.mlp.gate_proj.weight"


@pytest.fixture
def convert(upcycle: Callable[..., Outcome], source: Path, tmp_path: Path) -> Callable[..., Outcome]:
    """Runs a conversion that is refused: nothing is written, and the source stays as it is."""

    def run(*arguments: object, given: object = source, output: Path = tmp_path / "output") -> Outcome:
        before = contents(tmp_path)
        outcome = upcycle("convert", f"source={given}", f"output={output}", *SMALL, *arguments)
        assert contents(tmp_path) == before
        assert not list(tmp_path.rglob(".*partial")), "a staging directory was left"
        return outcome

    return run


class Bad(NamedTuple):
    arguments: tuple[str, ...]
    says: tuple[str, ...]
    found: str = ""
    remedy: str | None = None


REQUESTS = {
    "T % G": Bad(
        ("moe.expansion=4", "moe.top_k=3"),
        ("moe.top_k would break virtual groups", "expected: a multiple of granularity"),
        found="top_k 3 % granularity 2 = 1",
        remedy="set moe.top_k to 2 or 4",
    ),
    "d_ff % G": Bad(
        ("moe.granularity=5", "moe.top_k=5"),
        ("moe.granularity shards of equal width", "expected: a divisor of d_ff"),
        found="d_ff 24 % granularity 5 = 4",
        remedy="set moe.granularity to 4 or 6",
    ),
    "N % G": Bad(
        ("moe.expansion=2.5",),
        ("the number of experts N must be a multiple of moe.granularity", "expected: N % granularity = 0"),
        found="expansion 2.5 * granularity 2 = 5 experts",
        remedy="set moe.expansion to 2 or 3",
    ),
    "top_k > experts": Bad(
        ("moe.top_k=6",),
        ("more experts than there are", "at most 4"),
        found="top_k 6 of 4",
        remedy="set moe.top_k to 4",
    ),
    "granularity beyond d_ff": Bad(("moe.granularity=1000",), (), found="d_ff 24", remedy="set moe.granularity to 24"),
    "granularity 0": Bad(("moe.granularity=0",), ("moe.granularity is out of range", "1 or more"), found="0"),
    "top_k 0": Bad(("moe.top_k=0",), ("moe.top_k is out of range", "1 or more"), found="0"),
    "expansion 0": Bad(("moe.expansion=0",), ("moe.expansion is out of range", "1 or more"), found="0"),
    "expansion nan": Bad(("moe.expansion=nan",), ("moe.expansion is out of range",), found="nan"),
    "expansion inf": Bad(("moe.expansion=inf",), ("moe.expansion is out of range",), found="inf"),
    "shared -1": Bad(("moe.shared_experts=-1",), ("moe.shared_experts is out of range", "0 or more"), found="-1"),
    "top_k a word": Bad(("moe.top_k=two",), ("moe.top_k is not valid", "a valid integer"), found="two"),
    "top_k a fraction": Bad(("moe.top_k=1.5",), ("moe.top_k is not valid", "a valid integer"), found="1.5"),
    "layers a word": Bad(("moe.layers=some",), ("moe.layers is not understood", "all, every_2"), found="some"),
    "layers every_0": Bad(("moe.layers=every_0",), ("moe.layers is not understood",), found="every_0"),
    "layers a number": Bad(("moe.layers=1",), ("moe.layers is not understood",), found="1"),
    "layers of words": Bad(("moe.layers=[a,b]",), ("moe.layers is not understood",), found="['a', 'b']"),
    "layers none": Bad(("moe.layers=[]",), ("moe.layers names no layer",), found="[]"),
    "layers beyond": Bad(("moe.layers=[0,3]",), ("one that the model does not have", "0 to 2"), found="[0, 3]"),
    "layers negative": Bad(("moe.layers=[-1]",), ("one that the model does not have",), found="[-1]"),
    "layers every_4": Bad(("moe.layers=every_4",), ("moe.layers names no layer",), found="every_4"),
    "router_order": Bad(
        ("moe.router_order=softmax_topp",),
        ("moe.router_order", "topk_softmax"),
        "softmax_topp",
        "did you mean softmax_topk",
    ),
    "groups": Bad(("moe.groups=tide",), ("moe.groups", "free, tied, whole, positions"), "tide", "did you mean tied?"),
    "groups without groups": Bad(
        ("moe.groups=positions", "moe.granularity=1"),
        ("moe.groups=positions needs virtual groups, and there are none",),
        found="granularity=1, 2 experts",
        remedy="leave moe.groups out",
    ),
    "groups that a native type lacks": Bad(
        ("moe.groups=positions", "target=qwen2_moe"),
        ("target=qwen2_moe cannot express", "a type that can: upcycled_moe"),
        found="moe.groups is positions, it can express tied (the router rows of a group stay equal",
        remedy="set target=upcycled_moe",
    ),
    "init": Bad(("init=drp",), ("unknown value for init", "virtual_group"), found="drp", remedy="did you mean drop?"),
    "init.name": Bad(("init.name=drp",), ("unknown value for init",), found="drp", remedy="did you mean drop?"),
    "init.scaling": Bad(
        ("init.scaling=exat",), ("init.scaling", "or a positive number"), found="exat", remedy="did you mean exact?"
    ),
    "init.scaling -1": Bad(("init.scaling=-1",), ("init.scaling is out of range", "a positive number"), found="-1"),
    "init.scaling nan": Bad(("init.scaling=nan",), ("init.scaling is out of range",), found="nan"),
    "router_std": Bad(("init.router_std=nan",), ("init.router_std is out of range", "0 or more"), found="nan"),
    "init.std": Bad(("init=noise", "init.std=inf"), ("init.std is out of range",), found="inf"),
    "drop ratio": Bad(("init=drop", "init.ratio=1.5"), ("init.ratio is out of range", "0 to 1"), found="1.5"),
    "drop neurons": Bad(
        ("init=drop", "init.neurons=coherant"), ("init.neurons", "independent"), "coherant", "did you mean coherent?"
    ),
    "latent": Bad(("moe.latent=17",), ("moe.latent is out of range", "1 to 16, the hidden size"), found="17"),
    "latent a word": Bad(("moe.latent=half",), ("moe.latent is not valid",), found="half"),
    "latent start": Bad(
        ("moe.latent=8", "init.latent=exakt"), ("init.latent", "compress"), "exakt", remedy="did you mean exact?"
    ),
    "compress without latents": Bad(
        ("init.latent=compress",),
        ("init.latent=compress is for a moe.latent below the hidden size",),
        found="moe.latent=null",
        remedy="set moe.latent=8",
    ),
    "exact without the whole FFN": Bad(
        ("moe.latent=8", "moe.shared_neurons=4"),
        ("with init.latent=exact the shared expert is the whole FFN",),
        found="moe.shared_neurons=4",
        remedy="set moe.shared_neurons=all",
    ),
    "compress with the whole FFN": Bad(
        ("moe.latent=8", "init.latent=compress", "moe.shared_neurons=all"),
        ("takes neurons of the FFN",),
        found="moe.shared_neurons=all",
        remedy="set moe.shared_neurons=NUMBER",
    ),
    "compress what is random": Bad(
        ("moe.latent=8", "init.latent=compress", "init=random"),
        ("init.latent=compress keeps what init=random draws anew",),
        found="init=random",
        remedy="leave init.latent out",
    ),
    "too few tokens for latents": Bad(
        ("moe.latent=8", "init.latent=compress", "calibration_tokens=63"),
        ("calibration_tokens is too small", "64, or more"),
        found="63",
        remedy="set calibration_tokens=64",
    ),
    "native target without latents": Bad(
        ("moe.latent=8", "target=qwen2_moe"),
        ("target=qwen2_moe cannot express",),
        found="moe.latent is 8, it can express null",
        remedy="set target=upcycled_moe",
    ),
    "target": Bad(("target=mixtrall",), ("unknown target", "upcycled_moe"), "mixtrall", "did you mean mixtral?"),
    "dtype": Bad(("dtype=bfloat17",), ("unknown dtype", "float32"), "bfloat17", "did you mean bfloat16"),
    "shard size without a unit": Bad(("max_shard_size=5",), ("max_shard_size",), found="5"),
    "shard size of another unit": Bad(("max_shard_size=5XB",), ("is not a size", "5GB or 500MB"), found="5XB"),
    "calibration_tokens": Bad(("calibration_tokens=-5",), ("calibration_tokens is out of range",), found="-5"),
    "shard size 0": Bad(("max_shard_size=0GB",), ("is not a size",), found="0GB"),
    "shard size below a byte": Bad(("max_shard_size=0.0001KB",), ("is not a size",), found="0.0001KB"),
    "native target without the router order": Bad(
        ("target=mixtral",),
        ("target=mixtral cannot express", "expected: a type that can: qwen2_moe, upcycled_moe"),
        found="router order is softmax_topk, it can express topk_softmax",
        remedy="set target=qwen2_moe",
    ),
    "native target without the backbone": Bad(
        ("target=olmoe", "moe.shared_experts=1"),
        ("target=olmoe cannot express", "shared experts is of width 12, it can express none"),
        found="query/key norm is none, it can express full",
        remedy="target=auto",
    ),
    "unknown option": Bad(
        ("moe.granularty=2",),
        ("unknown option", "did you mean moe.granularity"),
        "moe.granularty",
        "upcycle convert --help",
    ),
    "unknown section": Bad(("mo.top_k=2",), ("unknown option", "moe.top_k"), found="mo.top_k"),
    "option of another init": Bad(
        ("init.ratio=0.5",), ("init.ratio does not apply here", "init.ratio with init=drop"), found="init.ratio"
    ),
    "added option": Bad(("+moe.foo=1",), ("unknown option",), found="moe.foo"),
    "removed option": Bad(("~moe.top_k",), ("a required option is missing",), remedy="add moe.top_k=VALUE"),
    "no equals sign": Bad(("overwrite",), ("cannot read an argument", "key=value"), found="overwrite"),
    "unbalanced": Bad(("target={a",), ("cannot read an argument",), found="target={a", remedy="target='{a'"),
    "not a truth value": Bad(("overwrite=maybe",), ("overwrite is not valid", "valid boolean"), found="maybe"),
    "unknown interpolation": Bad(("seed=${sed}",), ("sed",)),
    "sweep without -m": Bad(("seed=1,2",), ("Ambiguous value", "--multirun")),
}


@pytest.mark.parametrize("bad", REQUESTS.values(), ids=REQUESTS.keys())
def test_requests(convert, bad):
    convert(*bad.arguments).refused(*bad.says, found=bad.found, remedy=bad.remedy)


@pytest.mark.parametrize("bad", [REQUESTS[name] for name in ("T % G", "target", "unknown option", "top_k a word")])
def test_plan_refuses_the_same(upcycle, source, bad):
    outcome = upcycle("plan", f"source={source}", *SMALL, *bad.arguments)
    outcome.refused(*bad.says, found=bad.found, remedy=(bad.remedy or "").replace("convert", "plan") or None)
    assert outcome.out == ""


def test_commands(upcycle):
    upcycle("convrt").refused("unknown command", "plan, convert, verify", found="convrt", remedy="did you mean convert")
    upcycle("convert", "output=x").refused("a required option is missing", "source=", remedy="add source=VALUE")
    upcycle("convert", "source=x").refused("a required option is missing", "output=", remedy="add output=VALUE")
    upcycle("convert", "source=x", "output=null").refused("output is not valid", "a valid string", found="null")
    upcycle("plan", "source=x", "format=yaml").refused("unknown format", "table, json", found="yaml")
    assert upcycle("plan", "--cfg", "jobs").status == 2


# The source.


@pytest.mark.parametrize(
    ("given", "says", "found"),
    [
        ("{tmp}/nothing", "source does not exist", "nothing"),
        ("~/no/such/model", "source does not exist", "~/no/such/model"),
        ("no_such_model", "source does not exist", "no_such_model"),
        ("{tmp}/source/config.json", "source is a file that is not GGUF", "config.json"),
        ("{tmp}/work", "no config.json there", "work"),
    ],
)
def test_no_source(convert, tmp_path, given, says, found):
    convert(given=given.format(tmp=tmp_path)).refused(says, found=found)


@pytest.mark.parametrize(
    ("text", "says", "found"),
    [
        ("{", "config.json is not JSON", "config.json"),
        ("", "config.json is not JSON", "config.json"),
        ("\ud800", "config.json is not JSON", "config.json"),
        ("[1]", "config.json is not a JSON object", "[1]"),
        ("{}", "unknown dense architecture", "model_type=None"),
    ],
)
def test_config_that_is_none(convert, source, text, says, found):
    (source / "config.json").write_text(text, errors="surrogatepass")
    convert().refused(says, found=found)


@pytest.mark.parametrize(
    ("change", "says", "found", "remedy"),
    [
        ({"model_type": "lama"}, "unknown dense architecture", "model_type=lama", "did you mean llama"),
        ({"model_type": "bert"}, "unknown dense architecture", "model_type=bert", None),
        ({"model_type": "mixtral"}, "already a mixture of experts", "model_type=mixtral", "upcycle inspect"),
        ({"num_local_experts": 8}, "already a mixture of experts", "'num_local_experts': 8", "dense model"),
        (
            {"quantization_config": {"quant_method": "gptq"}},
            "the source is quantised",
            "quant_method=gptq",
            "dequantize()",
        ),
        ({"quantization_config": "int8"}, "the source is quantised", "quant_method=int8", "dequantize()"),
        ({"hidden_size": "wide"}, "config.json is not valid", "hidden_size", "the model's own files"),
        ({"num_attention_heads": 0}, "config.json is not valid", "config.json", "the model's own files"),
        ({"num_attention_heads": None}, "config.json", "", None),
        ({"intermediate_size": 48}, "does not have the shape that config.json says", "(16, 24)", "from the same model"),
        ({"vocab_size": 65}, "does not have the shape that config.json says", "(64, 16)", "from the same model"),
        ({"num_hidden_layers": 2}, "tensors that a llama model does not have", "model.layers.2", "model_type"),
        ({"num_hidden_layers": 4}, "lacks tensors of a llama model", "30 tensors", "download the complete checkpoint"),
    ],
    ids=str,
)
def test_config_of_another_model(convert, source, change, says, found, remedy):
    edit_json(source / "config.json", lambda config: config.update(change))
    convert().refused(says, found=found, remedy=remedy)


def test_tensors_that_do_not_fit(convert, source):
    add_tensor(source, "model.layers.0.mlp.gate_projj.weight", torch.ones(2))
    convert().refused(
        "tensors that a llama model does not have", "did you mean", found="gate_projj", remedy="model_type"
    )


def test_missing_tensor(convert, source):
    remove_tensor(source, GATE)
    convert().refused("the source lacks tensors", f"expected: {GATE}", remedy="download the complete checkpoint")


def test_wrong_shape(convert, source):
    edit_tensor(source, GATE, lambda t: t.T.contiguous())
    convert().refused(GATE, "expected: (24, 16)", found="(16, 24)", remedy="from the same model")


def shards(source: Path) -> list[Path]:
    return sorted(source.glob("model-*.safetensors"))


def test_missing_shard(convert, source):
    shards(source)[1].unlink()
    convert().refused("1 of the", "are missing", found="no model-00002-of-", remedy="download the missing files")


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_truncated_shard(convert, source, size):
    content = shards(source)[1].read_bytes()
    shards(source)[1].write_bytes(content[:size])
    convert().refused("model-00002-of-", "not a valid safetensors file", found="bytes", remedy="truncated or corrupt")


def test_corrupt_header(convert, source):
    content = bytearray(shards(source)[0].read_bytes())
    content[8:12] = b"!!!!"
    shards(source)[0].write_bytes(content)
    convert().refused("not a valid safetensors file", "a JSON header", found="not JSON", remedy="truncated or corrupt")


@pytest.mark.parametrize("way", ["../", "absolute"])
def test_index_that_leaves_the_directory(convert, source, tmp_path, way):
    inside, outside = shards(source)[0], tmp_path / "outside.safetensors"
    inside.rename(outside)
    names = {"../": "../outside.safetensors", "absolute": str(outside)}

    def redirect(index):
        index["weight_map"] = {k: names[way] if v == inside.name else v for k, v in index["weight_map"].items()}

    edit_json(source / INDEX, redirect)
    convert().refused("lies outside the checkpoint", found=names[way], remedy="do not trust this checkpoint")


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": {"a": 1}}'])
def test_broken_index(convert, source, text):
    (source / INDEX).write_text(text)
    convert().refused(INDEX)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\x00\x00\x00" + bytes(16), b"not GGUF at all" * 10])
def test_damaged_gguf(convert, tmp_path, content):
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    convert(given=file).refused("model.gguf", found="")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("shard_size", ["5GB", "1KB"])
def test_not_finite(convert, source, value, shard_size):
    """Found in the middle of the writing; the staging directory goes too, since the mended source is another one."""

    def spoil(tensor):
        tensor[3, 5] = value
        return tensor

    edit_tensor(source, GATE, spoil)
    outcome = convert(f"max_shard_size={shard_size}")
    outcome.refused(f"NaN or infinity in {GATE}", found="1 of 384 values", remedy="repair the checkpoint")


def test_float16_overflow(convert, source):
    edit_tensor(source, GATE, lambda t: t * 1e9)
    outcome = convert("dtype=float16")
    outcome.refused("NaN or infinity in model.layers.1.mlp.experts", "in float16", remedy="dtype=bfloat16")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_dtype_that_the_source_cannot_give(convert, source, dtype):
    edit_tensor(source, GATE, lambda t: t.to(dtype))
    outcome = convert("dtype=bfloat16")
    outcome.refused("the source cannot give dtype=bfloat16", "F32, BF16, F16", found=f"{GATE} is", remedy="dequantise")


def test_dtype_that_a_source_without_weights_cannot_give(upcycle, source):
    for file in shards(source):
        file.unlink()
    edit_json(source / "config.json", lambda config: config.update(dtype="float8_e4m3fn"))
    outcome = upcycle("plan", f"source={source}", *SMALL)
    outcome.refused("the source cannot give dtype=auto", found="F8_E4M3", remedy="dequantise")


def test_calibration_without_a_tokenizer(convert):
    outcome = convert("init.scaling=calibrated")
    outcome.refused("there is no tokenizer", found="source", remedy="add the tokenizer files")


def to_pickle(source: Path) -> None:
    tensors = {name: tensor for file in shards(source) for name, tensor in load_file(file).items()}
    for file in [*shards(source), source / INDEX]:
        file.unlink()
    torch.save(tensors, source / "pytorch_model.bin")


def test_a_pickle_works_and_says_so(upcycle, source, tiny_llama, tmp_path):
    to_pickle(source)
    for given, name in ((source, "pickled"), (tiny_llama, "mapped")):
        outcome = upcycle("convert", f"source={given}", f"output={tmp_path / name}", *SMALL)
        assert outcome.status == 0
        assert ("pytorch_model.bin is a pickle" in outcome.err) is (given == source)
        assert "is a pickle" not in outcome.out
    name = "model.safetensors"
    assert (tmp_path / "pickled" / name).read_bytes() == (tmp_path / "mapped" / name).read_bytes()


def test_a_malicious_pickle(convert, source, tmp_path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    to_pickle(source)
    for save in (torch.save, lambda content, file: file.write_bytes(pickle.dumps(content, protocol=2))):
        save({"w": Attack()}, source / "pytorch_model.bin")
        convert().refused("cannot be loaded as weights only", found="mkdir", remedy="do not trust this file")
        assert not (tmp_path / "owned").exists()


@pytest.mark.slow
def test_hub_while_offline(tmp_path):
    outcome = process(
        "plan", "source=no-one/no-such-model", cwd=tmp_path, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hf")
    )
    outcome.refused("the Hub model could not be had", found="no-one/no-such-model", remedy="HF_HUB_OFFLINE")


@pytest.mark.slow
def test_hub_out_of_reach(tmp_path):
    with socket.socket() as taken:  # bound, but not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
        outcome = process("plan", "source=a/b", cwd=tmp_path, HF_ENDPOINT=endpoint, HF_HOME=str(tmp_path / "hf"))
    outcome.refused("the Hub model could not be had", found="a/b", remedy="check the name and the connection")


# The output.


def test_output_exists(convert, tmp_path):
    output = tmp_path / "output"
    output.mkdir()
    convert().refused("output exists already", remedy="overwrite=true")
    (output / "thesis.tex").touch()
    convert("overwrite=true").refused(
        "something else than a model checkpoint", found="thesis.tex", remedy="another output"
    )
    shutil.rmtree(output)
    output.touch()
    convert("overwrite=true").refused("is a file", "a directory, or nothing there yet")


def test_output_exists_is_found_before_the_source_is_read(upcycle, tmp_path):
    outcome = upcycle("convert", f"source={tmp_path}/nothing", f"output={tmp_path}")
    outcome.refused("exists already")


@pytest.mark.parametrize("place", ["", "/moe", "/a/b", "/../source"])
@pytest.mark.parametrize("overwrite", ["false", "true"])
def test_output_inside_the_source(convert, source, place, overwrite):
    outcome = convert(f"overwrite={overwrite}", output=Path(f"{source}{place}"))
    if overwrite == "true" or place in ("/moe", "/a/b"):
        outcome.refused("the output and the source overlap", remedy="choose another output")
    else:
        outcome.refused("exists already")


def test_source_inside_the_output(convert, source, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    convert("overwrite=true", output=tmp_path).refused("the output and the source overlap", found=str(source))


def test_output_that_is_a_link_to_the_source(convert, source, tmp_path):
    (tmp_path / "output").symlink_to(source)
    convert("overwrite=true").refused("the output and the source overlap", found=str(source))


def test_disk_too_small(convert, monkeypatch):
    small = shutil.disk_usage("/")._replace(free=20_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: small)
    convert().refused("the disk is too small", "expected: 0.00 GB", found="0.00 GB free", remedy="free space")


def test_parent_that_is_a_file(convert, tmp_path):
    (tmp_path / "file").touch()
    convert(output=tmp_path / "file" / "output").refused("cannot write", remedy="whose parent is a directory")


def test_read_only_output(convert, tmp_path, monkeypatch):
    parent = tmp_path / "parent"
    parent.mkdir(mode=0o555)
    if os.access(parent, os.W_OK):  # root may write everywhere: let the system say what it says to others
        mkdir = Path.mkdir

        def refuse(path, *args, **kwargs):
            if path.parent == parent:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            mkdir(path, *args, **kwargs)

        monkeypatch.setattr(Path, "mkdir", refuse)
    outcome = convert(output=parent / "output")
    outcome.refused("cannot write", found="Permission denied", remedy="a directory that you may write to")


def test_two_at_once(convert, upcycle, source, tmp_path):
    output = tmp_path / "output"
    with Staging.open(output, fingerprint="another", overwrite=False, resume=False) as staging:
        staging.write_text("precious", "x")
        for way in ("resume=true", "overwrite=true"):
            outcome = upcycle("convert", f"source={source}", f"output={output}", *SMALL, way)
            outcome.refused("another process is writing", remedy="wait for it to end")
            assert (staging.directory / "precious").exists()
    assert not output.exists()


def test_interrupted_run_in_the_way(upcycle, source, tmp_path):
    output = tmp_path / "output"
    with Staging.open(output, fingerprint="another", overwrite=False, resume=False):
        pass
    arguments = ("convert", f"source={source}", f"output={output}", *SMALL)
    upcycle(*arguments).refused("an interrupted run left", remedy="resume=true, or start again with overwrite=true")
    upcycle(*arguments, "resume=true").refused("with other settings or another source", remedy="overwrite=true")
    assert upcycle(*arguments, "overwrite=true").status == 0


@pytest.mark.parametrize(("room", "kept"), [(500, False), (20_000, True)])
def test_disk_that_fills_up(upcycle, source, tmp_path, monkeypatch, room, kept):
    """What is complete stays, to be resumed; where no file is, nothing stays."""
    output, left, write = tmp_path / "output", room, os.write

    def limited(descriptor, data):
        nonlocal left
        if len(data) > left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left -= len(data)
        return write(descriptor, data)

    arguments = ("convert", f"source={source}", f"output={output}", *SMALL, "max_shard_size=8KB")
    with monkeypatch.context() as full:
        full.setattr(file_operations.os, "write", limited)
        outcome = upcycle(*arguments)
    outcome.refused("cannot write", "No space left on device", "then resume")
    assert not output.exists()
    assert (tmp_path / ".output.partial").exists() is kept
    assert upcycle(*arguments, "resume=true").status == 0
    assert json.loads((output / INDEX).read_text())["weight_map"]
