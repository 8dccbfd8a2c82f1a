"""What the scripts of all engines share. Knows numpy alone: it runs in each engine's own environment.

Each is called with a JSON file of cases and a directory for results. A case has a `name`, the `directory` of a
checkpoint, `prompts` (token ids) and `sequences` (each a prompt with what the reference goes on with). A result is a
.npz file: `greedy` [prompts, tokens], and for each sequence the `tokens` [positions, TOP] that the engine finds most
likely after each position with their `logprobs`; or a .txt file with what went wrong.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

TOP = 20
LIMIT_S = 600  # for a case


class Found(NamedTuple):
    """What an engine makes of a case.

    Attributes:
        greedy: token ids after each prompt.
        tokens, logprobs: of each sequence, [positions, TOP].
    """

    greedy: list[list[int]]
    tokens: list[np.ndarray]
    logprobs: list[np.ndarray]


def most_likely(logits_LV: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The TOP most likely tokens after each position, and their log probabilities."""
    logits_LV = logits_LV.astype(np.float64)
    with np.errstate(invalid="ignore"):
        shifted_LV = logits_LV - logits_LV.max(axis=-1, keepdims=True)
        logprobs_LV = shifted_LV - np.log(np.exp(shifted_LV).sum(axis=-1, keepdims=True))
    tokens_LT = np.argsort(-logprobs_LV, axis=-1)[:, :TOP]
    return tokens_LT, np.take_along_axis(logprobs_LV, tokens_LT, axis=-1)


def run_cases(measure: Callable[[dict[str, Any]], Found]) -> None:
    """Measure every case in a process of its own, which may die of it."""
    cases, results = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    context = multiprocessing.get_context("fork")
    for number, case in enumerate(cases):
        process = context.Process(target=_measured, args=(measure, case, results / f"{number}"))
        process.start()
        process.join(LIMIT_S)
        if process.is_alive():
            process.kill()
            process.join()
        if not any(results.glob(f"{number}.*")):
            (results / f"{number}.txt").write_text(f"the process ended with status {process.exitcode}")


def _measured(measure: Callable[[dict[str, Any]], Found], case: dict[str, Any], stem: Path) -> None:
    try:
        found = measure(case)
    except BaseException as error:
        traceback.print_exc()
        line = " ".join(str(error).split()) or type(error).__name__
        stem.with_suffix(".txt").write_text(f"{type(error).__name__}: {line}")
        return
    arrays = {f"tokens_{i}": each for i, each in enumerate(found.tokens)}
    arrays |= {f"logprobs_{i}": each for i, each in enumerate(found.logprobs)}
    np.savez(stem.with_suffix(".npz"), greedy=np.array(found.greedy), **arrays)
