"""Which experts take which tokens: the router's own choices, beside the tokens and domains that they belong to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import conversions
import models
import numpy as np
import pytest
import torch

from upcycle.data.bytes_tokenizer import EOS, byte_tokenizer
from upcycle.data.config import DataConfig, DomainConfig
from upcycle.data.corpus import build_corpus
from upcycle.errors import ConfigError, SourceError
from upcycle.evaluation.choices import Choices, held_out_choices
from upcycle.models.load import load_checkpoint
from upcycle.models.moe import describe_moe

if TYPE_CHECKING:
    from pathlib import Path

LENGTH, WINDOWS = 16, 6


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny E4G2T2 that reads bytes, beside the dense model that it was made from."""
    root = tmp_path_factory.mktemp("choices")
    models.save(models.build("llama", vocab_size=257), root / "dense")
    byte_tokenizer().save_pretrained(root / "dense")
    return conversions.run(conversions.options(root / "dense", root / "moe")).directory


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Two domains of four texts each, of which half are held out."""
    root = tmp_path_factory.mktemp("texts")
    domains = {}
    for name in ("words", "numbers"):
        (root / name).mkdir()
        for number in range(4):
            text = f"{name} of text {number}é\n" if name == "words" else f"{number}{number + 1}\n"
            (root / name / f"{number}.txt").write_text(text * 20)
        domains[name] = DomainConfig(name="text", files=f"{root}/{name}/*.txt", weight=1)
    return DataConfig(name="mixture", domains=domains, held_out=2, cache_dir=str(root / "cache"))


@pytest.fixture(scope="module")
def choices(directory: Path, data: DataConfig) -> Choices:
    return held_out_choices(directory, data, sequence_length=LENGTH, windows=WINDOWS)


def test_tokens_and_domains_are_those_of_the_held_out_windows(choices: Choices, data: DataConfig) -> None:
    held_out = build_corpus(data, byte_tokenizer(), sequence_length=LENGTH).held_out
    expected = [held_out[name][number]["input_ids"] for name in ("words", "numbers") for number in range(WINDOWS)]
    assert choices.tokens_WS.tolist() == torch.stack(expected).tolist()
    assert choices.domain_W.tolist() == ["words"] * WINDOWS + ["numbers"] * WINDOWS


@torch.no_grad()
def test_experts_are_those_that_score_highest(choices: Choices, directory: Path) -> None:
    """From what enters the router, window by window; the mutant is the choice for the window before."""
    model, moe = load_checkpoint(directory), describe_moe(directory)
    assert (choices.expert_count, list(choices.experts)) == (moe.experts, list(moe.layers))
    for layer in moe.layers:
        router, inputs = model.get_submodule(moe.router_path(layer)), []
        hook = router.register_forward_pre_hook(lambda _module, given, kept=inputs: kept.append(given[0]))
        for window in choices.tokens_WS:
            model(torch.from_numpy(window)[None])
        hook.remove()
        x_WSH = torch.stack([each.reshape(LENGTH, -1) for each in inputs])
        top_WSK = (x_WSH @ router.weight.T).topk(moe.top_k).indices.sort(dim=-1).values.numpy()
        found_WSK = np.sort(choices.experts[layer], axis=-1)
        assert found_WSK.shape == (2 * WINDOWS, LENGTH, moe.top_k)
        assert (found_WSK == top_WSK).mean() > 0.99  # scores of two groups can be equal within float32
        assert (found_WSK == np.roll(top_WSK, 1, axis=0)).mean() < 0.9


def test_what_tokens_stand_for(choices: Choices) -> None:
    assert choices.texts[ord("w")] == "w"
    assert choices.texts["é".encode()[0]] == "\ufffd"
    assert choices.texts.get(256, "") == ""
    assert EOS not in choices.texts.values()


def test_what_cannot_be_read(directory: Path, data: DataConfig) -> None:
    with pytest.raises(SourceError, match="not a mixture of experts"):
        held_out_choices(directory.with_name("dense"), data, sequence_length=LENGTH, windows=1)
    with pytest.raises(ConfigError, match="sequence_length is out of range"):
        held_out_choices(directory, data, sequence_length=10_000, windows=1)
