"""What explains a feature and simulates it from the explanation: the protocol, and explainers that need no language model.

The rules read what a language model is shown, five fragments and their activations from 0 to 10, and put down which
tokens the feature was active on. They cannot say what those have in common, so they are a floor for explanations
of token features and blind to features of meaning; and they are exact, cost nothing and come out the same each time.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeVar

from trainer.paper.interpretability.records import Record, quantise

Tokens = Sequence[str]
Key = TypeVar("Key")


class Simulation(NamedTuple):
    """Of one sequence, on the scale from 0 to 10."""

    expected: list[float]
    values: list[list[float]]
    """Of each token, what the activation may be."""
    probabilities: list[list[float]]
    """Of each of the values."""


class Explanation(Protocol):
    """All that a simulator knows of a feature."""

    text: str
    threshold: float
    """Above it, `detects` and `agrees` mean yes."""

    def simulate(self, sequences: Sequence[Tokens]) -> list[Simulation]:
        """The activations on every token, sequence by sequence."""
        ...

    def detects(self, sequences: Sequence[Tokens]) -> list[float]:
        """How sure it is that the feature is active somewhere in a sequence."""
        ...

    def agrees(self, sequences: Sequence[Tokens], marks: Sequence[Sequence[bool]]) -> list[float]:
        """How sure it is that every marked token of a sequence is one of the feature's."""
        ...


class Explainer(Protocol):
    """Makes explanations."""

    name: str
    about: str
    """What it is, for readers of the report."""

    def explain(self, train: Sequence[Record], largest: float) -> Explanation:
        """From a feature's fragments; `largest` is the strongest activation in them."""
        ...


class TokenSet:
    """Each token with its mean activation in the fragments; others are taken for inactive."""

    name = "token"
    about = (
        "token: each token of the five fragments, in lower case without spaces, with its mean activation there; no "
        "language model"
    )

    def explain(self, train: Sequence[Record], largest: float) -> Explanation:
        return _Table(*_tables(train, largest), with_previous=False)


class TokenAfterToken:
    """Each pair of tokens with its mean activation; of an unknown pair the second token's."""

    name = "token+previous"
    about = "token+previous: as token, for each token together with the one before it, if the pair was seen; no language model"

    def explain(self, train: Sequence[Record], largest: float) -> Explanation:
        return _Table(*_tables(train, largest), with_previous=True)


RULES: dict[str, Explainer] = {rule.name: rule for rule in (TokenSet(), TokenAfterToken())}
_LISTED = 12


class _Table:
    threshold = 0.0

    def __init__(
        self, single: dict[str, float], pair: dict[tuple[str, str], float], *, with_previous: bool
    ) -> None:
        self._single = single
        self._pair = pair if with_previous else {}
        self.text = _describe(self._pair) if with_previous else _describe(single)

    def simulate(self, sequences: Sequence[Tokens]) -> list[Simulation]:
        found = []
        for tokens in sequences:
            expected = [
                self._pair.get((before, token), self._single.get(token, 0.0))
                for before, token in _pairs(tokens)
            ]
            found.append(Simulation(expected, [[f] for f in expected], [[1.0]] * len(expected)))
        return found

    def detects(self, sequences: Sequence[Tokens]) -> list[float]:
        return [max(simulation.expected) for simulation in self.simulate(sequences)]

    def agrees(self, sequences: Sequence[Tokens], marks: Sequence[Sequence[bool]]) -> list[float]:
        return [
            min(f for f, marked in zip(simulation.expected, own, strict=True) if marked)
            for simulation, own in zip(self.simulate(sequences), marks, strict=True)
        ]


def _tables(
    train: Sequence[Record], largest: float
) -> tuple[dict[str, float], dict[tuple[str, str], float]]:
    single: dict[str, list[int]] = defaultdict(list)
    pair: dict[tuple[str, str], list[int]] = defaultdict(list)
    for record in train:
        levels = quantise(record.activations, largest)
        for (before, token), level in zip(_pairs(record.tokens), levels, strict=True):
            single[token].append(level)
            pair[before, token].append(level)
    # A pair that was seen inactive is kept: it says that the token alone is not enough.
    return _means(single), _means(pair)


def _means(levels: dict[Key, list[int]]) -> dict[Key, float]:
    return {key: sum(seen) / len(seen) for key, seen in levels.items()}


def _pairs(tokens: Tokens) -> list[tuple[str, str]]:
    """Every token after the one before it; the first after none."""
    plain = [token.strip().lower() for token in tokens]
    return list(zip(["", *plain[:-1]], plain, strict=True))


def _describe(means: dict[str, float] | dict[tuple[str, str], float]) -> str:
    ranked = sorted(means.items(), key=lambda entry: (-entry[1], str(entry[0])))
    named = [
        f"{' '.join(key) if isinstance(key, tuple) else key!s}".strip() + f" {level:.3g}"
        for key, level in ranked[:_LISTED]
        if level > 0
    ]
    return ", ".join(named) or "no token"
