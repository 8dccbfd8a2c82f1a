"""The command line as its user meets it: help, composition, sweeps, completion, paths, and what is printed where."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version

import pytest
from cli import INDEX, SMALL, process
from transformers import LlamaConfig, NemotronConfig

from upcycle.cli.app import COMMANDS, main

pytest_plugins = ["tiny"]

DEFAULTS = {
    "plan": "format: table",
    "convert": "overwrite: false",
    "verify": "tolerance: 0.001",
    "inspect": "path: ???",
    "evaluate": "sequence_length: null",
    "train": "architecture: null",
    "plan-sweep": "architecture: null",
    "dashboard": "push: false",
    "report": "baseline: null",
    "pack": "name: null",
    "sync": "project: null",
    "export": "checkpoint: last",
}


def test_version(upcycle):
    assert upcycle("--version").out == f"upcycle {version('upcycle')}\n"


def test_usage(upcycle):
    for arguments in ((), ("--help",), ("-h",)):
        outcome = upcycle(*arguments)
        assert outcome.status == 0
        assert all(f"  {name} " in outcome.out for name in COMMANDS)
        assert outcome.err == ""


@pytest.mark.parametrize("name", COMMANDS)
def test_help(upcycle, name):
    outcome = upcycle(name, "--help")
    assert outcome.status == 0
    assert outcome.out.startswith(f"upcycle {name} ")
    assert DEFAULTS[name] in outcome.out
    assert "hydra:" not in outcome.out
    assert outcome.err == ""


def test_help_of_convert(upcycle):
    text = upcycle("convert", "--help").out
    assert "init: copy, drop, noise, random, virtual_group" in text
    for option in ("moe:\n  expansion: 8\n  granularity: 8\n  top_k: 8", "source: ???", "output: ???", "target: auto"):
        assert option in text


@pytest.mark.parametrize("name", COMMANDS)
def test_cfg_job(upcycle, name):
    outcome = upcycle(name, "--cfg", "job", *(["seed=3", "init=drop"] if name == "convert" else []))
    assert outcome.status == 0
    assert DEFAULTS[name] in outcome.out
    if name == "convert":
        assert "seed: 3" in outcome.out
        assert "ratio: 0.5" in outcome.out


def test_plan(upcycle, tiny_llama):
    outcome = upcycle("plan", f"source={tiny_llama}", *SMALL)
    assert outcome.status == 0
    assert outcome.err == ""
    for text in ("llama -> E2G2T2", "4 of width 12, 2 active; 3 of 3 layers", "lossless", "why qwen2_moe"):
        assert text in outcome.out


def test_plan_as_json(upcycle, tiny_llama):
    outcome = upcycle("plan", f"source={tiny_llama}", *SMALL, "format=json")
    plan = json.loads(outcome.out)
    assert outcome.err == ""
    assert plan["target"] == "qwen2_moe"
    assert plan["moe"]["experts"] == 4
    assert plan["lossless"] is True
    assert sum(plan["files"].values()) == plan["cost"]["bytes_to_write"]
    assert plan["tensors"]["model.embed_tokens.weight"]["from"] == "model.embed_tokens.weight"


def test_convert_writes_what_plan_said(upcycle, tiny_llama, tmp_path):
    options = (f"source={tiny_llama}", *SMALL, "moe.layers=every_2", "max_shard_size=8KB")
    plan = json.loads(upcycle("plan", *options, "format=json").out)
    output = tmp_path / "parent" / "output"
    outcome = upcycle("convert", *options, f"output={output}")
    assert outcome.status == 0
    assert outcome.out.endswith(f"wrote {output}\nnext: upcycle verify source={tiny_llama} moe={output}\n")
    written = {file.name for file in output.iterdir()}
    assert {*plan["files"], INDEX, "config.json", "README.md", "upcycle_manifest.json"} <= written
    assert [path.name for path in output.parent.iterdir()] == ["output"]
    manifest = json.loads((output / "upcycle_manifest.json").read_text())
    assert manifest["plan_sha256"] == plan["fingerprint"]


def test_a_sweep_runs_every_job(upcycle, tiny_llama):
    outcome = upcycle("plan", "-m", f"source={tiny_llama}", *SMALL[::2], "moe.granularity=1,2")
    assert outcome.status == 0
    assert re.findall(r"E2G\dT2", outcome.out) == ["E2G1T2", "E2G2T2"]
    started = [line.split()[-1] for line in outcome.err.splitlines() if line.startswith("upcycle: plan source=")]
    assert started == ["moe.granularity=1", "moe.granularity=2"]


@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_flag_of_a_sweep_may_stand_anywhere(upcycle, tiny_llama, place):
    arguments = [f"source={tiny_llama}", "moe.granularity=1,2"]
    arguments.insert(place, "-m")
    outcome = upcycle("plan", *arguments)
    assert outcome.status == 0
    assert re.findall(r"E8G\dT8", outcome.out) == ["E8G1T8", "E8G2T8"]


def test_a_failing_job_does_not_stop_the_others(upcycle, tiny_llama):
    sweep = (*SMALL[::2], "moe.granularity=5,2,7,1", "format=json")
    outcome = upcycle("plan", "-m", f"source={tiny_llama}", *sweep)
    assert outcome.status == 1
    plans = [json.loads(each) for each in re.split(r"(?<=^})\n", outcome.out, flags=re.MULTILINE) if each]
    assert [plan["moe"]["granularity"] for plan in plans] == [2, 1]
    assert outcome.err.count("cannot be cut into moe.granularity shards") == 2


def test_a_sweep_of_conversions(upcycle, tiny_llama, tmp_path):
    outputs = "${init.name}-${moe.granularity}"
    sweep = ("init=virtual_group,copy", "moe.granularity=1,2", f"output={tmp_path}/out/{outputs}")
    assert upcycle("convert", "--multirun", f"source={tiny_llama}", *SMALL[::2], *sweep).status == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["copy-1", "copy-2", "virtual_group-1", "virtual_group-2"]


# Paths.


@pytest.mark.parametrize("name", ["a b", "a=b", "it's", '"quoted"', "(1)", "{a}", "[1]", "7", "1e3", "true", "ü~#!"])
def test_paths_are_taken_literally(upcycle, tiny_llama, tmp_path, name):
    given = shutil.copytree(tiny_llama, tmp_path / "models" / name)
    output = tmp_path / "out" / name
    assert upcycle("convert", f"source={given}", f"output={output}", *SMALL).status == 0
    assert (output / "config.json").is_file()


@pytest.mark.parametrize("name", ["a=b", "7", "true", "[1]"])
def test_relative_paths(upcycle, tiny_llama, tmp_path, work, name):
    shutil.copytree(tiny_llama, work / name)
    assert upcycle("plan", f"source={name}", *SMALL).status == 0
    assert upcycle("convert", f"source=./{name}", "output=../out", *SMALL).status == 0
    assert (tmp_path / "out" / "config.json").is_file()


def test_home(upcycle, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(tiny_llama, tmp_path / "models" / "llama")
    assert upcycle("convert", "source=~/models/llama", "output=~/out", *SMALL).status == 0
    assert (tmp_path / "out" / "config.json").is_file()


def test_quoting_and_interpolation_still_work(upcycle, tiny_llama, tmp_path):
    assert upcycle("plan", f"source='{tiny_llama}'", *SMALL).status == 0
    output = "out-${moe.top_k}"
    assert upcycle("convert", f"source={tiny_llama}", f"output={tmp_path}/{output}", *SMALL).status == 0
    assert (tmp_path / "out-2").is_dir()


def test_a_sweep_over_sources(upcycle, source, tiny_llama):
    outcome = upcycle("plan", "-m", f"source={source},{tiny_llama}", *SMALL)
    assert outcome.status == 0
    assert "source -> E2G2T2" in outcome.out
    assert "llama -> E2G2T2" in outcome.out


# Models that are not on this machine.


NEMOTRON_340B = NemotronConfig(
    vocab_size=256000,
    hidden_size=18432,
    intermediate_size=73728,
    num_hidden_layers=96,
    num_attention_heads=96,
    num_key_value_heads=8,
    max_position_embeddings=4096,
    hidden_act="relu2",
    dtype="bfloat16",
)
LLAMA_70B = LlamaConfig(
    vocab_size=128256,
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    dtype="bfloat16",
)


@pytest.mark.parametrize(
    ("config", "matrices", "vectors", "target"),
    [(NEMOTRON_340B, 2, 2, "upcycled_moe"), (LLAMA_70B, 3, 1, "qwen2_moe")],
    ids=["nemotron-4-340b", "llama-3-70b"],
)
def test_plan_needs_only_the_config(upcycle, tmp_path, config, matrices, vectors, target):
    """`matrices` of an FFN and `vectors` of a norm give the parameters, counted here on another way."""
    config.save_pretrained(tmp_path / "model")
    plan = json.loads(upcycle("plan", f"source={tmp_path / 'model'}", "format=json").out)
    assert plan["target"] == target
    assert plan["lossless"] is True
    assert plan["moe"]["name"] == "E8G8T8"
    hidden, layers = config.hidden_size, config.num_hidden_layers
    keys = hidden * config.num_key_value_heads // config.num_attention_heads
    ffns, attention = layers * matrices * hidden * config.intermediate_size, layers * 2 * hidden * (hidden + keys)
    dense = ffns + attention + 2 * config.vocab_size * hidden + (2 * layers + 1) * vectors * hidden
    assert plan["cost"]["dense_parameters"] == dense
    written = 2 * plan["cost"]["parameters"] + plan["cost"]["padding_bytes"]
    assert plan["cost"]["bytes_to_write"] == written == sum(plan["files"].values())
    assert 0 <= plan["cost"]["parameters"] - (dense + 7 * ffns + layers * 64 * hidden) <= layers * hidden
    assert {each["dtype"] for each in plan["tensors"].values()} == {"BF16"}


def test_plan_of_a_large_model_as_a_table(upcycle, tmp_path):
    NEMOTRON_340B.save_pretrained(tmp_path / "model")
    outcome = upcycle("plan", f"source={tmp_path / 'model'}")
    assert outcome.status == 0
    assert "64 of width 9216, 8 active; 96 of 96 layers" in outcome.out


def test_plan_needs_only_config_and_index(upcycle, source):
    for file in source.glob("*.safetensors"):
        file.unlink()
    assert upcycle("plan", f"source={source}", *SMALL).status == 0
    outcome = upcycle("convert", f"source={source}", f"output={source}-moe", *SMALL)
    outcome.refused("are missing", remedy="download the missing files")


# Tab completion.


def complete(upcycle, monkeypatch, line: str) -> list[str]:
    monkeypatch.setenv("COMP_LINE", line)
    monkeypatch.setenv("COMP_POINT", str(len(line)))
    outcome = upcycle("-sc", "query=bash")
    assert outcome.status == 0
    assert outcome.err == ""
    return outcome.out.split()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("upcycle ", {*COMMANDS}),
        ("upcycle con", {"convert"}),
        ("upcycle convert ", {"moe.", "init=", "init.", "source=", "output=", "resume="}),
        ("upcycle plan ", {"moe.", "init=", "source=", "format="}),
        ("upcycle verify ", {"source=", "moe=", "tolerance="}),
        ("upcycle convert init=", {"init=copy", "init=drop", "init=noise", "init=random", "init=virtual_group"}),
        ("upcycle convert init=dr", {"init=drop"}),
        ("upcycle convert init=drop init.", {"init.ratio=", "init.neurons="}),
        ("upcycle plan moe.gr", {"moe.granularity="}),
        ("upcycle plan -m moe.top_k=2,4 moe.exp", {"moe.expansion="}),
        ("upcycle plan --cf", {"--cfg"}),
    ],
)
def test_completion(upcycle, monkeypatch, line, offered):
    assert offered <= set(complete(upcycle, monkeypatch, line))


@pytest.mark.parametrize(
    "line", ["upcycle nonsense ", "upcycle plan {= ", "upcycle plan init=nonsense init.", "upcycle plan 'a"]
)
def test_nothing_to_complete(upcycle, monkeypatch, line):
    assert not [word for word in complete(upcycle, monkeypatch, line) if not word.startswith("hydra")]


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_completion_in_bash(tmp_path):
    """Evaluates the printed script and completes as bash would after <TAB>."""
    script = """
    set -e
    eval "$(upcycle -sc install=bash)"
    complete -p upcycle
    for line in "upcycle plan moe.gran" "upcycle ver"; do
        COMP_LINE="$line" COMP_POINT=${#line} COMP_WORDS=($line) COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
        hydra_bash_completion
        echo "completed: ${COMPREPLY[*]}"
    done
    """
    executables = tmp_path / "bin"
    executables.mkdir()
    program = executables / "upcycle"
    program.write_text(f"#!{sys.executable}\nfrom upcycle.cli import main\nmain()\n")
    program.chmod(0o755)
    ended = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        env=os.environ | {"PATH": f"{executables}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert ended.stdout.splitlines() == [
        "complete -o default -o nospace -F hydra_bash_completion upcycle",
        "completed: moe.granularity=",
        "completed: verify",
    ]


# As a process.


@pytest.mark.slow
def test_as_a_process(tiny_llama, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    outcome = process("plan", "-m", f"source={tiny_llama}", *SMALL, "moe.granularity=5,2", "format=json", cwd=work)
    assert outcome.status == 1
    assert json.loads(outcome.out)["moe"]["granularity"] == 2
    assert "Traceback" not in outcome.err
    assert not list(work.iterdir())


@pytest.mark.slow
def test_a_reader_that_stops_reading(tiny_llama, tmp_path):
    script = (
        f'"{sys.executable}" -c "from upcycle.cli import main; main()" plan "source={tiny_llama}" format=json | head -1'
    )
    ended = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout == "{\n"
    assert ended.stderr == ""


def test_a_bug_is_traced_on_request(monkeypatch, work):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(sys, "argv", ["upcycle", "plan", f"source={work}/nothing"])
    with pytest.raises(ValueError, match="source does not exist"):
        main()
    assert os.environ["HYDRA_FULL_ERROR"] == "1"


def test_starting_does_not_import_torch(tmp_path):
    """`--help` and completion answer at once."""
    probe = (
        "import sys; from upcycle.cli import main; sys.argv[1:] = ['--help']; main(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", probe], cwd=tmp_path, timeout=60, check=True, stdout=subprocess.DEVNULL)


def test_resolve_without_cfg(upcycle):
    upcycle("plan", "--resolve").refused("--resolve needs --cfg")
