"""What the tests of reward models share: tiny ones, rows with labels, and stand-ins for the packages with lexicons."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import models
import torch
from hydra import compose, initialize_config_dir
from transformers import AutoModelForSequenceClassification

from upcycle.arch.head import label_fields
from upcycle.options.arguments import CONF, typed_options
from upcycle.train.config import TrainConfig

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

ATTRIBUTES = ("helpfulness", "correctness", "verbosity")
WORDS = ("argument", "parser", "action", "option", "value", "error", "usage", "help")


def build(name: str, attributes: tuple[str, ...] = ATTRIBUTES, **changes: Any) -> nn.Module:
    """A reward model in which no bias is 0, no norm is 1, and activations stay of order 1."""
    torch.manual_seed(0)
    config = models.config(name, **label_fields(attributes), **changes)
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(noise * models.HIDDEN**-0.5 if parameter.dim() == 2 else parameter + 0.2 * noise)
    return model


def scores(directory: Path, ids: torch.Tensor) -> torch.Tensor:
    """What plain transformers scores, refusing missing and unexpected tensors."""
    given = {"dtype": torch.float32, "experts_implementation": "eager"}
    model, info = AutoModelForSequenceClassification.from_pretrained(directory, output_loading_info=True, **given)
    problems = {kind: found for kind, found in info.items() if found}
    assert not problems, problems
    with torch.inference_mode():
        found: torch.Tensor = model.eval()(input_ids=ids).logits
    return found


def rated(file: Path, rows: int = 40, **more: Any) -> Path:
    """Rows as HelpSteer has them: the more words, the more verbose; every third has no label of correctness."""
    lines = []
    for number in range(rows):
        words = 1 + number % len(WORDS)
        row = {
            "prompt": f"What is {WORDS[number % len(WORDS)]} {number}?",
            "response": " ".join(WORDS[:words]),
            "helpfulness": number % 5,
            "correctness": None if number % 3 == 0 else 4 - number % 5,
            "verbosity": words / 2,
        }
        lines.append(json.dumps(row | more))
    file.write_text("\n".join(lines) + "\n")
    return file


def lexicons(directory: Path) -> Path:
    """Packages named as those on PyPI, with a few lines in the form of theirs."""
    (directory / "textblob" / "en").mkdir(parents=True)
    (directory / "textblob" / "__init__.py").write_text("raise RuntimeError('nobody needs to import this')\n")
    words = "\n".join(
        f'<word form="{word}" pos="JJ" sense="{gloss}" polarity="{polarity}" subjectivity="{number % 3 / 2}" '
        'intensity="1.0" confidence="0.9" />'
        for number, (word, gloss, polarity) in enumerate(
            (f"{word}{number}", f"{quality} in the {number}th way", value)
            for number in range(12)
            for word, quality, value in (("nice", "giving pleasure", 0.6), ("vile", "morally bad", -0.8))
        )
    )
    unglossed = '<word form="odd" pos="JJ" sense="" polarity="0.1" subjectivity="0.2" />'
    xml = f'<?xml version="1.0" encoding="utf-8"?>\n<sentiment language="en">\n{words}\n{unglossed}\n</sentiment>\n'
    (directory / "textblob" / "en" / "en-sentiment.xml").write_text(xml)
    (directory / "vaderSentiment").mkdir()
    (directory / "vaderSentiment" / "__init__.py").write_text("")
    lines = [f"word{number}\t{number % 9 - 4}.0\t0.5\t[{', '.join(['1'] * 10)}]" for number in range(24)]
    (directory / "vaderSentiment" / "vader_lexicon.txt").write_text("\n".join(lines) + "\n")
    return directory


def options(ratings: Path, output: Path, *changes: str) -> TrainConfig:
    """A run of 6 steps of 4 rows of 48 tokens in two micro-batches."""
    given = [
        f"output='{output}'",
        "objective=regression",
        "data=attributes",
        f"data.files='{ratings}'",
        f"data.attributes=[{','.join(ATTRIBUTES)}]",
        "data.held_out=8",
        "sequence_length=48",
        "batch.sequences=4",
        "batch.micro=2",
        "schedule.peak=1e-2",
        "validation.every=3",
        "log_every=1",
        "checkpoint_every=2",
        "progress=false",
        "budget.steps=6",
        *changes,
    ]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return typed_options(TrainConfig, compose("train", overrides=given))
