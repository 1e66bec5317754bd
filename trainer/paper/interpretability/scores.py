"""How well a simulation foretells activations, and means of such scores with their confidence."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Z = 1.96
"""Standard errors on either side of a mean that hold 95% of a normal distribution."""


class Score(NamedTuple):
    """OpenAI's three, over the tokens of all sequences together; None where one is not defined."""

    correlation: float | None
    """Pearson's. Not defined if activations or simulation are the same on all tokens."""
    r_squared: float | None
    """1 - mean (f - s)^2 / mean f^2. The simulation is on a scale of its own, so this says little; theirs has it."""
    absolute_dev_explained: float | None
    """1 - mean |f - s| / mean |f|."""


class Mean(NamedTuple):
    """Over features, with half the width of its 95% interval, 1.96 sd / sqrt(n) as in the paper's code."""

    value: float
    half: float
    features: int
    undefined: int = 0
    """Features without a score."""

    @property
    def low(self) -> float:
        return self.value - self.half

    @property
    def high(self) -> float:
        return self.value + self.half

    def __str__(self) -> str:
        return f"{self.value:.3f} ± {self.half:.3f}"


def score(true: Sequence[Sequence[float]], simulated: Sequence[Sequence[float]]) -> Score:
    """Of simulated sequences, pooled; it is not a mean of scores of each."""
    f, s = (np.concatenate([np.asarray(row, float) for row in rows]) for rows in (true, simulated))
    square, size = np.mean(f * f), np.mean(np.abs(f))
    return Score(
        correlation(f, s),
        None if square == 0 else float(1 - np.mean((f - s) ** 2) / square),
        None if size == 0 else float(1 - np.mean(np.abs(f - s)) / size),
    )


def correlation(true: np.ndarray, simulated: np.ndarray) -> float | None:
    """Pearson's; None if one of the two is constant."""
    if np.ptp(true) == 0 or np.ptp(simulated) == 0:
        return None
    return float(np.corrcoef(true, simulated)[0, 1])


def mean(values: Sequence[float | None]) -> Mean | None:
    """Of features' scores. One that is not defined counts as 0: a constant simulation foretells nothing.

    The paper's code lets one NaN make the mean NaN. None if there are fewer than two features.
    """
    if len(values) < 2:
        return None
    filled = np.array([0.0 if value is None else value for value in values])
    half = Z * filled.std(ddof=1) / math.sqrt(len(filled))
    undefined = sum(value is None for value in values)
    return Mean(float(filled.mean()), float(half), len(filled), undefined)


def defined_mean(values: Sequence[float | None]) -> Mean | None:
    """Of those features that have such a score at all; None if fewer than two do."""
    there = [value for value in values if value is not None]
    found = mean(there)
    return found and found._replace(undefined=len(values) - len(there))


def balanced_accuracy(positive: Sequence[bool], negative: Sequence[bool]) -> float | None:
    """Mean of the shares of positives and of negatives told right; None if there are none of either.

    The lists say which of them were taken for positives.
    """
    if not positive or not negative:
        return None
    return (np.mean(positive) + 1 - np.mean(negative)).item() / 2


def auroc(positive: Sequence[float], negative: Sequence[float]) -> float | None:
    """How often a positive has the larger value than a negative, ties counting half; None if there are none of either."""
    if not positive or not negative:
        return None
    larger = np.subtract.outer(np.asarray(positive, float), np.asarray(negative, float))
    return float((np.sign(larger) / 2 + 0.5).mean())
