"""When a claim about scores counts as reproduced: rules on means and their 95% intervals, and nothing else."""

from collections.abc import Mapping, Sequence

from trainer.paper.interpretability.scores import Mean
from trainer.paper.page import Verdict

SMALL = 0.5
"""Share of a gain up to which it counts as a small part of it."""


def above(ours: Sequence[Mean], others: Sequence[Mean]) -> Verdict:
    """Reproduced if each of ours is above all others with its whole interval, not reproduced if none of ours is.

    Without anything to compare it is neither.
    """
    if not ours or not others:
        return Verdict.DIFFERS
    clear = [all(own.low > other.high for other in others) for own in ours]
    if all(clear):
        return Verdict.REPRODUCED
    return Verdict.DIFFERS if any(clear) else Verdict.NOT_REPRODUCED


def lower_in_the_same_order(
    pairs: Sequence[tuple[Mean, Mean]], ours: Sequence[Mean], others: Sequence[Mean]
) -> Verdict:
    """Of two kinds of score, in pairs of the first and the second: is the second lower for each, and ours still ahead?

    `ours` and `others` are of the second kind, and ahead means by the mean alone.
    """
    lower = all(second.value < first.value for first, second in pairs)
    ahead = bool(ours and others) and all(
        own.value > other.value for own in ours for other in others
    )
    if lower and ahead:
        return Verdict.REPRODUCED
    return Verdict.DIFFERS if lower or ahead else Verdict.NOT_REPRODUCED


def no_better(first: Mean, second: Mean) -> Verdict:
    """Reproduced if the first's interval does not lie above the second's."""
    return Verdict.NOT_REPRODUCED if first.low > second.high else Verdict.REPRODUCED


def share_of_gain(plain: Mean, changed: Mean, ours: Mean) -> float | None:
    """Which part of the way from `plain` to `ours` the change goes; None if ours is not above it."""
    gain = ours.value - plain.value
    return (changed.value - plain.value) / gain if gain > 0 else None


def small_parts(shares: Mapping[str, float | None]) -> Verdict:
    """Reproduced if every change explains at most `SMALL` of the gain, not reproduced if none does."""
    if not shares:
        return Verdict.DIFFERS
    small = [share is not None and share <= SMALL for share in shares.values()]
    if all(small):
        return Verdict.REPRODUCED
    return Verdict.DIFFERS if any(small) else Verdict.NOT_REPRODUCED
