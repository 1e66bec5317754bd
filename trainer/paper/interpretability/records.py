"""The fragments that a feature is explained from and scored on, as the paper's code picks them (interpret.py)."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

SPLITS = 4
"""Of the fragments of strongest activation, interleaved: explained from, two left out, scored on ..."""
LEVELS = 10
"""What the strongest activation that an explainer sees becomes."""


class Record(NamedTuple):
    """One fragment and what a feature does on it; OpenAI's ActivationRecord."""

    tokens: tuple[str, ...]
    activations: tuple[float, ...]
    """Not below 0."""


class Chosen(NamedTuple):
    """Numbers of fragments, chosen for one feature."""

    top: list[int]
    """Of strongest activation, strongest first."""
    random: list[int]
    """Of those in which it is active, which may be among `top`: the paper's draw."""
    fresh: list[int]
    """Of those in which it is active, and not among `top`."""
    any: list[int]
    """Of all that are not among `top`, active or not: the draw of OpenAI's own code."""
    silent: list[int]
    """In which it is not active; fewer, or none, if there are no more."""


class Records(NamedTuple):
    """What one feature is explained from and scored on."""

    chosen: Chosen
    top: list[Record]
    random: list[Record]
    fresh: list[Record]
    any: list[Record]
    silent: list[Record]

    @property
    def train(self) -> list[Record]:
        """What the explainer sees."""
        return self.top[::SPLITS]

    @property
    def scored_top(self) -> list[Record]:
        """The paper's valid split of the fragments of strongest activation."""
        return self.top[2::SPLITS]

    @property
    def scored_random(self) -> list[Record]:
        """The paper's valid split of the random ones, of which it makes a split less."""
        return self.random[1 : (SPLITS - 1) * per_split(len(self.random)) : SPLITS - 1]

    @property
    def max_train(self) -> float:
        """The strongest activation that the explainer sees."""
        return max(max(record.activations) for record in self.train)


def per_split(examples: int) -> int:
    """How many of so many fragments are in each split."""
    return examples // SPLITS


def least_firing(examples: int) -> int:
    """In how many fragments a feature must be active for all of its draws."""
    return examples + per_split(examples)


def choose(
    peaks: Float[Tensor, " fragments"], examples: int, generator: torch.Generator
) -> Chosen | None:
    """The fragments of a feature with these largest activations; None if it is active in too few."""
    firing = (peaks > 0).nonzero().squeeze(1)
    if len(firing) < least_firing(examples):
        return None
    top = peaks.sort(descending=True, stable=True).indices[:examples]
    rest = torch.ones(len(peaks), dtype=torch.bool)
    rest[top] = False
    few = per_split(examples)
    return Chosen(
        top.tolist(),
        _draw(firing, examples, generator),
        _draw(firing[rest[firing]], few, generator),
        _draw(rest.nonzero().squeeze(1), few, generator),
        _draw((peaks <= 0).nonzero().squeeze(1), 2 * few, generator),
    )


def records(
    chosen: Chosen, activations: Float[Tensor, "fragments tokens"], texts: Sequence[Sequence[str]]
) -> Records:
    """The chosen fragments of a feature with these activations."""

    def listed(numbers: list[int]) -> list[Record]:
        return [
            Record(tuple(texts[number]), tuple(activations[number].tolist())) for number in numbers
        ]

    return Records(chosen, *(listed(numbers) for numbers in chosen))


def quantise(activations: Sequence[float], largest: float) -> list[int]:
    """On the scale from 0 to `LEVELS` on which `largest` is the end; all 0 if it is not above 0."""
    if largest <= 0:
        return [0] * len(activations)
    return [min(LEVELS, math.floor(LEVELS * max(0.0, f) / largest)) for f in activations]


def generator(seed: int, feature: int) -> torch.Generator:
    """For the draws of one feature, whichever others are looked at."""
    return torch.Generator().manual_seed(seed * 1_000_003 + feature)


def _draw(numbers: Tensor, count: int, generator: torch.Generator) -> list[int]:
    return numbers[torch.randperm(len(numbers), generator=generator)[:count]].tolist()
