"""Specialisation: classes by hand, information against sklearn's and against what is known, gains over pairs."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from upcycle.analysis.specialisation import (
    CLASSES,
    END,
    gains,
    information,
    mutual_information,
    shares,
    token_classes,
)

BYTES = {number: chr(number) for number in range(128)} | {256: "", 200: "\ufffd"}
W, S, N = 64, 32, 8


def classes_of(text: str) -> list[str]:
    return token_classes(np.array([[ord(each) for each in text]]), BYTES)[0].tolist()


def test_classes_of_bytes() -> None:
    named = dict(zip("nisk0wrbqpo", (each for each in CLASSES if each != END), strict=False))
    text = 'if x1:\n    return "ab_c" + [12]\n'
    short = "kkswrpniiiikkkkkksqwrrrqspsb00bn"
    assert classes_of(text) == [named[each] for each in short]
    assert len(named) == len(CLASSES) - 1


def test_classes_that_need_the_text_around_them() -> None:
    """The mutant of a rule without context: `if` within a word is no keyword, and space within a line no indent."""
    assert classes_of("gift")[1:3] == ["word rest", "word rest"]
    assert classes_of("a  b")[1:3] == ["space", "space"]
    assert classes_of("\n  b")[1:3] == ["indent", "indent"]
    assert classes_of("x12") == ["word start", "word rest", "word rest"]


def test_special_and_other_tokens() -> None:
    found = token_classes(np.array([[ord("a"), 256], [200, ord("b")]]), BYTES)
    assert found.tolist() == [["word start", END], ["other", "word start"]]


def test_tokens_of_several_characters_count_by_the_first_that_is_not_white() -> None:
    texts = {0: "def", 1: " if", 2: " name", 3: "  ", 4: "\n\n", 5: "(12"}
    found = token_classes(np.array([[0, 2, 5, 1, 3, 2, 4]]), texts)[0].tolist()
    assert found == ["keyword", "word start", "bracket", "keyword", "space", "word start", "newline"]


@pytest.fixture
def labels() -> np.ndarray:
    return np.random.default_rng(0).choice(["a", "b", "c"], size=(W, S), p=[0.5, 0.3, 0.2])


def test_shares_by_hand() -> None:
    experts_WSK = np.array([[[0, 1], [0, 2]], [[1, 2], [0, 1]]])
    table = shares(experts_WSK, np.array([["x", "y"], ["y", "x"]]), experts=4)
    assert table["x"].tolist() == [0.5, 0.5, 0, 0]
    assert table["y"].tolist() == [0.25, 0.25, 0.5, 0]


def test_shares_of_classes_are_in_their_order() -> None:
    table = shares(np.zeros((1, 3, 1), dtype=int), np.array([["word rest", "newline", "space"]]), experts=2)
    assert table.columns.tolist() == ["newline", "space", "word rest"]


def test_mutual_information_is_sklearns() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    counts = np.random.default_rng(0).integers(0, 50, size=(N, 5))
    expected = metrics.mutual_info_score(None, None, contingency=counts) / math.log(2)
    assert mutual_information(counts) == pytest.approx(expected, rel=1e-12)


def test_experts_that_follow_the_label_tell_all_of_it(labels: np.ndarray) -> None:
    experts_WSK = np.searchsorted(["a", "b", "c"], labels)[..., None]
    found = information(experts_WSK, labels, experts=N)
    assert found["bits"] == pytest.approx(found["entropy"])
    assert found["entropy"] == pytest.approx(stats.entropy(np.unique(labels, return_counts=True)[1], base=2))
    assert 0.95 < found["explained"] <= 1


def test_experts_that_ignore_the_label_tell_nothing_beyond_chance(labels: np.ndarray) -> None:
    """The plain estimate is above 0 by about (N - 1)(C - 1) / 2T nats; chance takes that away."""
    experts_WSK = np.random.default_rng(1).integers(0, N, size=(W, S, 2))
    found = information(experts_WSK, labels, experts=N, permutations=50)
    assert found["bits"] > 0
    assert found["chance"] == pytest.approx((N - 1) * 2 / (2 * 2 * W * S) / math.log(2), rel=0.3)
    assert abs(found["explained"]) < 0.005


def test_chance_keeps_what_a_window_shares() -> None:
    """Windows of one label, and experts by window: the mutant, which permutes tokens, takes few windows for much."""
    generator = np.random.default_rng(2)
    labels = np.repeat(generator.choice(["a", "b"], size=(12, 1)), S, axis=1)
    experts_WSK = np.repeat(generator.integers(0, N, size=(12, 1)), S, axis=1)[..., None]
    found = information(experts_WSK, labels, experts=N, permutations=200)
    shuffled = generator.permutation(labels.ravel()).reshape(labels.shape)
    by_token = information(experts_WSK, shuffled, experts=N)["bits"]
    assert found["chance"] > 0.3
    assert by_token < 0.1


def test_one_label_explains_nothing() -> None:
    experts_WSK = np.random.default_rng(4).integers(0, N, size=(W, S, 1))
    found = information(experts_WSK, np.full((W, S), "a"), experts=N)
    assert (found["entropy"], found["explained"]) == (0.0, 0.0)


def test_information_does_not_depend_on_the_call(labels: np.ndarray) -> None:
    experts_WSK = np.random.default_rng(3).integers(0, N, size=(W, S, 1))
    assert information(experts_WSK, labels, experts=N) == information(experts_WSK, labels, experts=N)


def test_gains_by_hand() -> None:
    before, after = [0.1, 0.12, 0.09], [0.3, 0.33, 0.28]
    rows = [
        {"arm": arm, "seed": seed, "layer": layer, "explained": value + 0.01 * layer * seed * (arm == "trained")}
        for arm, values in (("step 0", before), ("trained", after), ("other", before))
        for seed, value in enumerate(values)
        for layer in (0, 1)
    ]
    found = gains(pd.DataFrame(rows), baseline="step 0").set_index(["arm", "layer"])
    row = found.loc["trained", 0]
    test = stats.ttest_rel(after, before)
    assert (row["difference"], row["pairs"]) == (pytest.approx(np.mean(after) - np.mean(before)), 3)
    assert (row["low"], row["high"]) == pytest.approx(test.confidence_interval(0.95))
    assert row["verdict"] == "more"
    assert found.loc["other", 0]["verdict"] == "undecided"
    turned = gains(pd.DataFrame(rows), baseline="trained").set_index(["arm", "layer"])
    assert turned.loc["step 0", 0]["verdict"] == "less"


def test_one_seed_decides_nothing() -> None:
    rows = [{"arm": arm, "seed": 0, "layer": 0, "explained": value} for arm, value in (("a", 0.1), ("b", 0.9))]
    found = gains(pd.DataFrame(rows), baseline="a")
    assert found["verdict"].tolist() == ["undecided"]
    assert found["low"].isna().all()
