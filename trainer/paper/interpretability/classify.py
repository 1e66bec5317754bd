"""Detection and fuzzing, as eai-delphi 0.1.3 defines them: does an explanation tell the feature's text from other text?

Detection: in which of ten fragments with the feature and ten without is it active? Fuzzing: the same fragments, tokens
marked; in those with the feature its tokens, in the others as many at random. Are all marked tokens the feature's? Both are
given as balanced accuracy and as AUROC. Delphi always marks the token three quarters into a fragment without the
feature, because its fragments are cut around the feature's token; those here are not.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from trainer.paper.interpretability.explainers import Explanation
from trainer.paper.interpretability.records import Record, Records
from trainer.paper.interpretability.scores import auroc, balanced_accuracy

MARKED = 0.3
"""Share of a fragment's strongest activation from which on a token is marked."""


class Told(NamedTuple):
    """How well fragments were told apart; None for a feature that is active in every fragment."""

    accuracy: float | None
    auroc: float | None


def detection(explanation: Explanation, records: Records) -> Told:
    """Of the scored fragments and those without the feature."""
    positive = [record.tokens for record in _tested(records)]
    negative = [record.tokens for record in records.silent]
    return _told(explanation.detects([*positive, *negative]), len(positive), explanation.threshold)


def fuzzing(explanation: Explanation, records: Records, generator: torch.Generator) -> Told:
    """Of the same fragments, with marked tokens."""
    tested = _tested(records)
    marks = [right(record) for record in tested]
    count = math.ceil(sum(f > 0 for r in tested for f in r.activations) / len(tested))
    marks += [_anywhere(record, count, generator) for record in records.silent]
    tokens = [record.tokens for record in [*tested, *records.silent]]
    return _told(explanation.agrees(tokens, marks), len(tested), explanation.threshold)


def right(record: Record) -> list[bool]:
    """The tokens on which the feature is most active."""
    least = MARKED * max(record.activations)
    return [f >= least for f in record.activations]


def _tested(records: Records) -> list[Record]:
    return [*records.scored_top, *records.scored_random]


def _anywhere(record: Record, count: int, generator: torch.Generator) -> list[bool]:
    order = torch.randperm(len(record.tokens), generator=generator)
    marked = set(order[:count].tolist())
    return [place in marked for place in range(len(record.tokens))]


def _told(sure: Sequence[float], positives: int, threshold: float) -> Told:
    positive, negative = sure[:positives], sure[positives:]
    yes, wrong = ([value > threshold for value in values] for values in (positive, negative))
    return Told(balanced_accuracy(yes, wrong), auroc(positive, negative))
