"""The questions of python_stdlib_facts as the harness wants them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

QUESTIONS = Path(__file__).with_suffix(".jsonl")


def load(**_metadata: Any) -> dict[str, Any]:
    """The only split, test: `purpose`, four `choices` and the index of the right one in `answer`."""
    from datasets import Dataset  # type: ignore[import-untyped]

    rows = [json.loads(line) for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]
    return {"test": Dataset.from_list(rows)}
