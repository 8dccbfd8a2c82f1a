"""How much an expert's index tells about a token: classes of tokens, shares of experts, mutual information. Pure.

A random router sends the same bytes to the same experts too, so what counts as specialised is what training added to
step 0, beyond what chance gives.

Shapes: W windows, S tokens of a window, K experts per token, N experts, C labels.
"""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import keyword
import math
import re
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy.special import entr, rel_entr

from upcycle.analysis.outcomes import SEED
from upcycle.analysis.statistics import holm, t_estimate

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    Labels = NDArray[np.str_]

END = "end of text"
_CLASS = re.compile(
    "|".join(
        [
            r"(?P<newline>\n)",
            r"(?P<indent>(?<=\n)[^\S\n]+)",
            r"(?P<space>[^\S\n]+)",
            rf"(?P<keyword>\b(?:{'|'.join(keyword.kwlist)})\b)",
            r"(?P<number>\b[0-9]\w*)",
            r"(?P<word_start>\b[A-Za-z_])",
            r"(?P<word_rest>[A-Za-z0-9_]+)",
            r"(?P<bracket>[()\[\]{}])",
            r"(?P<quote>[\"'`])",
            r"(?P<punctuation>[!-~])",
            r"(?P<other>.)",
        ]
    ),
    flags=re.ASCII,
)
CLASSES = (*(name.replace("_", " ") for name in _CLASS.groupindex), END)


def token_classes(tokens_WS: NDArray[np.int64], texts: Mapping[int, str]) -> Labels:
    """The class of every token, one of `CLASSES`: that of its first character that is not white, or of its first.

    A character's class follows from the text around it: a keyword of Python is one as a whole word (in prose too), an
    indent is the white space that a line begins with. What is not ASCII is `other`.

    Args:
        tokens_WS: ids of consecutive text.
        texts: what each id stands for; nothing is the end of a text.
    """
    pieces = [texts[token] for token in tokens_WS.ravel().tolist()]
    text = "".join(pieces)
    at_character = np.full(len(text) + 1, END, dtype=f"<U{max(map(len, CLASSES))}")
    for match in _CLASS.finditer(text):
        at_character[match.start() : match.end()] = str(match.lastgroup).replace("_", " ")
    lengths = np.array([len(piece) for piece in pieces])
    white = np.array([len(piece) - len(piece.lstrip()) for piece in pieces])
    starts = np.cumsum(lengths) - lengths + np.where(white < lengths, white, 0)
    return np.where(lengths > 0, at_character[starts], END).reshape(tokens_WS.shape)


def shares(experts_WSK: NDArray[np.int64], labels_WS: Labels, *, experts: int) -> pd.DataFrame:
    """Of each label's choices, the share that each expert got: columns are labels, in `CLASSES`' order or by name.

    Returns:
        [N, C]; columns sum to 1.
    """
    counts, names = _counts(experts_WSK, labels_WS, experts)
    table = pd.DataFrame(counts / counts.sum(axis=0), columns=names)
    order = [*filter(set(names).__contains__, CLASSES)]
    return table[order] if len(order) == len(names) else table


def information(
    experts_WSK: NDArray[np.int64], labels_WS: Labels, *, experts: int, permutations: int = 20, seed: int = 0
) -> dict[str, float]:
    """Mutual information of a choice's expert and its token's label, and what chance gives.

    Chance is the mean over permutations of the windows' labels, which keeps what tokens of one window share.

    Returns:
        `bits`; `chance`, in bits; `entropy` of the label, in bits; and `explained`, the share of the entropy that the
        expert tells, chance subtracted: (bits - chance) / entropy, 0 where there is one label alone.
    """
    generator = np.random.default_rng(seed)
    counts, _ = _counts(experts_WSK, labels_WS, experts)
    bits = mutual_information(counts)
    by_chance = [
        mutual_information(_counts(experts_WSK, labels_WS[generator.permutation(len(labels_WS))], experts)[0])
        for _ in range(permutations)
    ]
    chance, entropy = float(np.mean(by_chance)), float(entr(counts.sum(axis=0) / counts.sum()).sum()) / math.log(2)
    explained = (bits - chance) / entropy if entropy else 0.0
    return {"bits": bits, "chance": chance, "entropy": entropy, "explained": explained}


def mutual_information(counts_NC: NDArray[np.int64]) -> float:
    """Of a table of counts, in bits, without correction."""
    joint_NC = counts_NC / counts_NC.sum()
    independent_NC = joint_NC.sum(axis=1, keepdims=True) * joint_NC.sum(axis=0, keepdims=True)
    return float(rel_entr(joint_NC, independent_NC).sum()) / math.log(2)


def gains(found: pd.DataFrame, *, baseline: str, confidence: float = 0.95) -> pd.DataFrame:
    """What arms explain beyond a baseline, such as step 0, over pairs of the same seed.

    Args:
        found: `arm`, `seed`, `layer`, `explained`; one row for each.
        baseline: the arm to compare with.
        confidence: of the interval and the verdict.

    Returns:
        One row per arm and layer: `arm`, `layer`, `pairs`, means `baseline` and `value`, their `difference` with `low`
        and `high` of the paired t interval, `p_holm` over all rows, and a `verdict`: `more`, `less` or `undecided`.
    """
    wide = found.pivot_table(index=["layer", SEED], columns="arm", values="explained", sort=False)
    rows = []
    for arm in wide.columns.drop(baseline):
        for layer, pairs in wide[[arm, baseline]].dropna().groupby(level="layer"):
            estimate = t_estimate(pairs[arm] - pairs[baseline], confidence=confidence)
            means = {"baseline": pairs[baseline].mean(), "value": pairs[arm].mean()}
            bounds = {"difference": estimate.mean, "low": estimate.low, "high": estimate.high, "p": estimate.p}
            rows.append({"arm": arm, "layer": layer, "pairs": len(pairs), **means, **bounds})
    table = pd.DataFrame(rows)
    table["p_holm"] = holm(table.pop("p"))
    table["verdict"] = [
        ("more" if row.difference > 0 else "less") if row.p_holm < 1 - confidence else "undecided"
        for row in table.itertuples()
    ]
    return table


def _counts(
    experts_WSK: NDArray[np.int64], labels_WS: Labels, experts: int
) -> tuple[NDArray[np.int64], NDArray[np.str_]]:
    """How often each expert took each label, [N, C], and the labels."""
    names, label_WS = np.unique(labels_WS, return_inverse=True)
    pair_WSK = experts_WSK * len(names) + label_WS.reshape(*labels_WS.shape, 1)
    return np.bincount(pair_WSK.ravel(), minlength=experts * len(names)).reshape(experts, len(names)), names
