"""What another version of transformers makes of checkpoints: see cases.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from cases import Found, most_likely, run_cases
from transformers import AutoModelForCausalLM

if TYPE_CHECKING:
    import numpy as np


def measure(case: dict[str, Any]) -> Found:
    model = loaded(case["directory"])
    new = len(case["sequences"][0]) - len(case["prompts"][0])
    ranked = [most_likely(logits(model, ids)) for ids in case["sequences"]]
    return Found(
        greedy=[continued(model, ids, new) for ids in case["prompts"]],
        tokens=[tokens for tokens, _ in ranked],
        logprobs=[logprobs for _, logprobs in ranked],
    )


def loaded(directory: str) -> Any:
    """A checkpoint in which no tensor is missing, unexpected or of another shape."""
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True, trust_remote_code=True
    )
    wrong = {name: found for name, found in info.items() if found}
    if wrong:
        raise ValueError(f"loaded with {wrong}")
    return model.eval()


@torch.inference_mode()
def logits(model: Any, sequence: list[int]) -> np.ndarray:
    """After every position but the last, [positions, vocabulary]."""
    return model(torch.tensor([sequence])).logits[0, :-1].numpy()


@torch.inference_mode()
def continued(model: Any, prompt: list[int], new: int) -> list[int]:
    """The `new` greedy tokens after a prompt, with a cache."""
    made: list[int] = []
    past, ids = None, torch.tensor([prompt])
    for _ in range(new):
        given = model(ids, past_key_values=past, use_cache=True)
        past, ids = given.past_key_values, given.logits[:, -1:].argmax(dim=-1)
        made.append(int(ids))
    return made


if __name__ == "__main__":
    run_cases(measure)
