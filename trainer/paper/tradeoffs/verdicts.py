"""When a claim about trade-offs counts as reproduced."""

import math
from collections.abc import Sequence
from itertools import pairwise

from trainer.paper.page import Verdict

PAPER_RISE = 40 / 25
"""Of Pythia-70M's perplexity, with its layer-2 residual stream reconstructed (arXiv 2309.08600, section 2)."""
OVER_FLOOR = 2.0
ABOVE_FLOOR = 1.2
SURE = 0.05


def falls(series: Sequence[Sequence[tuple[float, float]]]) -> Verdict:
    """By lines of (L0, FVU): reproduced if FVU is lower at every larger L0 of each line."""
    steps = [
        [after[1] < before[1] for before, after in pairwise(line)] for line in map(sorted, series)
    ]
    lower = [step for line in steps for step in line]
    if not lower:
        return Verdict.NOT_MEASURED
    if all(lower):
        return Verdict.REPRODUCED
    return Verdict.DIFFERS if sum(lower) > len(lower) / 2 else Verdict.NOT_REPRODUCED


def more_dead(pairs: Sequence[tuple[int, int]]) -> Verdict:
    """By the dead features of an MLP's dictionary and of the residual stream's trained alike.

    More are those that two such counts differ by seldom: twice the standard deviation of their difference, were they
    Poisson's.
    """
    more = [mlp - stream > 2 * math.sqrt(mlp + stream) for mlp, stream in pairs]
    if not more:
        return Verdict.NOT_MEASURED
    if all(more):
        return Verdict.REPRODUCED
    return Verdict.DIFFERS if any(more) else Verdict.NOT_REPRODUCED


def alike(pairs: Sequence[tuple[float, float]]) -> Verdict:
    """By the MMCS of dictionaries that differ in their seed, and that to random directions, as many."""
    if not pairs:
        return Verdict.NOT_MEASURED
    if all(mmcs >= OVER_FLOOR * floor for mmcs, floor in pairs):
        return Verdict.REPRODUCED
    above = all(mmcs >= ABOVE_FLOOR * floor for mmcs, floor in pairs)
    return Verdict.DIFFERS if above else Verdict.NOT_REPRODUCED


def modest(rises: Sequence[float]) -> Verdict:
    """By the factors that perplexity rises by: reproduced if one is no more than the paper's, differs up to its square."""
    if not rises:
        return Verdict.NOT_MEASURED
    least = min(rises)
    if least <= PAPER_RISE:
        return Verdict.REPRODUCED
    return Verdict.DIFFERS if least <= PAPER_RISE**2 else Verdict.NOT_REPRODUCED


def correlated(found: Sequence[tuple[float, float]]) -> Verdict:
    """By the correlations with skewness and kurtosis and their p-values."""
    sure = [r > 0 and p < SURE for r, p in found]
    if not sure:
        return Verdict.NOT_MEASURED
    if all(sure):
        return Verdict.REPRODUCED
    return Verdict.DIFFERS if any(sure) else Verdict.NOT_REPRODUCED
