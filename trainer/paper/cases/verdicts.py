"""When a claim of section 5 counts as reproduced."""

from collections.abc import Sequence
from typing import NamedTuple

from trainer.paper.cases.study import MONOSEMANTIC
from trainer.paper.page import Verdict

TWICE = 2.0
LEAST_CHANGE = 0.1
"""Nats that a log-probability must fall by, and the share that an activation must."""
OVER_PLACEBO = 3.0
OVER_USUAL = 10.0


def monosemantic(feature: float, coordinate: float) -> Verdict:
    """By the shares of their strong activations that are on one kind of token."""
    if feature >= MONOSEMANTIC and feature >= TWICE * coordinate:
        return Verdict.REPRODUCED
    return Verdict.DIFFERS if feature > coordinate else Verdict.NOT_REPRODUCED


class Change(NamedTuple):
    """Of one token by an ablation, in some contexts."""

    logit: float
    rank: int
    """1 if no other logit falls further."""
    log_probability: float
    placebo: float
    """Change of the log-probability by ablating another feature."""


def answer_falls(changes: Sequence[Change]) -> Verdict:
    """By what happens to the expected token, in the sentence and elsewhere."""
    if any(change.logit < 0 and change.rank == 1 for change in changes):
        return Verdict.REPRODUCED
    clear = any(_clear(change.log_probability, change.placebo) for change in changes)
    return Verdict.DIFFERS if clear else Verdict.NOT_REPRODUCED


def specific(changes: Sequence[tuple[float, float]]) -> Verdict:
    """By the changes of a token's log-probability, of the feature and of its placebo, for each feature."""
    clear = [_clear(own, placebo) for own, placebo in changes]
    if not clear:
        return Verdict.NOT_MEASURED
    if all(clear):
        return Verdict.REPRODUCED
    return Verdict.DIFFERS if any(clear) else Verdict.NOT_REPRODUCED


def caused(fall: float, fresh: float | None, usual: float) -> Verdict:
    """By the fall without the strongest cause, the same in fresh contexts, and the median fall without an active feature."""
    certain = fall if fresh is None else min(fall, fresh)
    if certain >= LEAST_CHANGE and certain >= OVER_USUAL * usual:
        return Verdict.REPRODUCED
    return Verdict.DIFFERS if certain >= LEAST_CHANGE / 2 else Verdict.NOT_REPRODUCED


def _clear(change: float, placebo: float) -> bool:
    """Whether a log-probability falls, and not just as it would without any other feature."""
    return change <= -LEAST_CHANGE and -change >= OVER_PLACEBO * abs(placebo)
