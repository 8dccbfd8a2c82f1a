"""Paired statistics for few seeds: t interval, Holm's adjustment, Fieller's interval of a ratio. Pure functions.

With 3 to 8 seeds a percentile bootstrap covers 72 to 88 % instead of 95 %; the paired t interval holds its level when
differences are about normal. Shapes: B pairs, A arms.
"""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import stats

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean with its uncertainty, in the unit of the data.

    Attributes:
        mean: of the sample.
        low, high: bounds of the confidence interval; NaN below two values.
        p: two-sided, of the hypothesis that the true mean is 0; NaN below two values.
    """

    mean: float
    low: float
    high: float
    p: float


def t_estimate(values_B: ArrayLike, *, confidence: float) -> Estimate:
    """Student's t interval of a mean; of differences within pairs, the paired t interval.

    Args:
        values_B: at least one finite value.
        confidence: coverage of the interval, such as 0.95.
    """
    sample_B = np.asarray(values_B, dtype=float)
    mean, count = float(sample_B.mean()), len(sample_B)
    if count < 2:
        return Estimate(mean=mean, low=math.nan, high=math.nan, p=math.nan)
    error = float(sample_B.std(ddof=1)) / math.sqrt(count)
    half = quantile(count, confidence=confidence) * error
    same = 0.0 if mean else 1.0  # p where the difference is the same in every pair
    p = 2 * float(stats.t.sf(abs(mean) / error, count - 1)) if error else same
    return Estimate(mean=mean, low=mean - half, high=mean + half, p=p)


def quantile(count: int, *, confidence: float) -> float:
    """Student's two-sided quantile for the mean of `count` values."""
    return float(stats.t.ppf((1 + confidence) / 2, count - 1))


def holm(p_A: ArrayLike) -> NDArray[np.float64]:
    """P values adjusted for all hypotheses together (Holm 1979); NaN is no hypothesis and stays NaN.

    The m-th smallest of A is multiplied by A - m + 1, and is not below the one before it.
    """
    given_A = np.asarray(p_A, dtype=float)
    adjusted_A = np.full_like(given_A, np.nan)
    order = [i for i in np.argsort(given_A, kind="stable") if not np.isnan(given_A[i])]
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * given_A[i]))
        adjusted_A[i] = largest
    return adjusted_A


def fieller(above_B: ArrayLike, below_B: ArrayLike, *, confidence: float) -> tuple[float, float, float]:
    """Ratio of two paired means, and Fieller's interval (Fieller 1954).

    The interval holds every ratio r for which a paired t test does not tell `above - r * below` from 0. It is unbounded
    where the mean below the line cannot be told from 0, and unknown (NaN) below two pairs.

    Returns:
        Ratio, low, high.
    """
    pairs_2B = np.asarray([above_B, below_B], dtype=float)
    count = pairs_2B.shape[1]
    above, below = pairs_2B.mean(axis=1)
    ratio = float(above / below) if below else math.nan
    if count < 2:
        return ratio, math.nan, math.nan
    share = quantile(count, confidence=confidence) ** 2 / count
    (var_above, covariance), (_, var_below) = share * np.cov(pairs_2B)
    # (above - r below)^2 <= share * var(above - r below), a quadratic in r
    square, middle, rest = below**2 - var_below, above * below - covariance, above**2 - var_above
    if square <= 0:
        return ratio, -math.inf, math.inf
    root = math.sqrt(max(0.0, middle**2 - square * rest))
    return ratio, float((middle - root) / square), float((middle + root) / square)
