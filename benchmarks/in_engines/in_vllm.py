"""What vLLM makes of checkpoints, on a CPU: see cases.py. Memory that it leaves uninitialised is filled with NaN."""

from __future__ import annotations

import os
from typing import Any

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

import numpy as np
import torch
from cases import TOP, Found, run_cases
from ungated_experts import give_ungated_experts
from vllm import LLM, SamplingParams


def _filled_with_nan(empty: Any) -> Any:
    """A missing bias would pass by luck otherwise."""

    def filled(*arguments: Any, **options: Any) -> torch.Tensor:
        made: torch.Tensor = empty(*arguments, **options)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    return filled


def measure(case: dict[str, Any]) -> Found:
    torch.empty = _filled_with_nan(torch.empty)
    give_ungated_experts()
    longest = max(map(len, case["sequences"]))
    model = LLM(
        case["directory"],
        skip_tokenizer_init=True,
        trust_remote_code=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=longest + 1,
        max_num_seqs=2,
        max_logprobs=TOP,
        model_impl=case.get("model_impl", "auto"),
    )
    new = longest - len(case["prompts"][0])
    asked = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": ids} for ids in case["prompts"]]
    greedy = [list(each.outputs[0].token_ids) for each in model.generate(prompts, asked, use_tqdm=False)]
    asked = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=TOP, ignore_eos=True, detokenize=False)
    sequences = [{"prompt_token_ids": ids} for ids in case["sequences"]]
    tokens, logprobs = [], []
    for each in model.generate(sequences, asked, use_tqdm=False):
        ranked = [sorted(found.items(), key=lambda item: item[1].rank)[:TOP] for found in each.prompt_logprobs[1:]]
        tokens.append(np.array([[token for token, _ in found] for found in ranked]))
        logprobs.append(np.array([[value.logprob for _, value in found] for found in ranked]))
    return Found(greedy=greedy, tokens=tokens, logprobs=logprobs)


if __name__ == "__main__":
    run_cases(measure)
