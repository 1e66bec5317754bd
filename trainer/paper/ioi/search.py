"""Which features a patch can do without: the search of arXiv 2309.08600, section 4.2, after ACDC (2304.14997).

It starts with all features. For each threshold, smallest first, it goes through those that are left, in random order, and
drops a feature if the KL rises by less than the threshold. One feature after the other, that is a run of the model for
each; here the outcomes are guessed, the runs that follow from the guesses are made as one batch, and their results
used as far as the guesses were right. The sets are the same.
"""

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

from trainer.paper.ioi.patching import Effect

Evaluate = Callable[[Sequence[tuple[int, ...]]], list[Effect]]
"""The effects of patching each of the sets."""


class Point(NamedTuple):
    """After a threshold."""

    threshold: float
    features: tuple[int, ...]
    effect: Effect


class Search:
    """One search; `steps` counts the runs that the search one by one would have made."""

    def __init__(
        self, evaluate: Evaluate, candidates: Sequence[int], seed: str, batch: int
    ) -> None:
        """`candidates` must hold every feature that differs; the others go at the first threshold anyway."""
        self._evaluate = evaluate
        self._candidates = tuple(candidates)
        self._random = random.Random(seed)
        self._batch = batch
        self._rise: dict[int, float] = {}
        """What dropping a feature did to the KL when it was last tried."""
        self._known: dict[frozenset[int], Effect] = {}
        self.steps = 0
        self.rounds = 0
        """Calls of `evaluate`."""

    def run(self, thresholds: Sequence[float], check: Callable[[], None]) -> list[Point]:
        """A point after each threshold; they must rise. `check` is called between runs, and may raise."""
        chosen = self._candidates
        effect = self._effects([chosen])[0]
        self._foresee(chosen, effect, check)
        points = []
        for threshold in thresholds:
            order = self._random.sample(chosen, len(chosen))
            chosen, effect = self._sweep(chosen, effect, order, threshold, check)
            points.append(Point(threshold, chosen, effect))
        return points

    def _foresee(self, chosen: tuple[int, ...], effect: Effect, check: Callable[[], None]) -> None:
        """What dropping each feature alone does is the first guess of what it will do later."""
        for start in range(0, len(chosen), self._batch):
            check()
            some = chosen[start : start + self._batch]
            found = self._effects([_without(chosen, feature) for feature in some])
            for feature, new in zip(some, found, strict=True):
                self._rise[feature] = new.kl - effect.kl

    def _sweep(
        self,
        chosen: tuple[int, ...],
        effect: Effect,
        order: Sequence[int],
        threshold: float,
        check: Callable[[], None],
    ) -> tuple[tuple[int, ...], Effect]:
        self.steps += len(order)
        at = 0
        while at < len(order):
            check()
            guessed = self._guess(chosen, order[at : at + self._batch], threshold)
            found = self._effects([without for _, without, _ in guessed])
            for (feature, without, drop), new in zip(guessed, found, strict=True):
                at += 1
                self._rise[feature] = new.kl - effect.kl
                dropped = new.kl - effect.kl < threshold
                if dropped:
                    chosen, effect = without, new
                if dropped != drop:
                    break
        return chosen, effect

    def _guess(
        self, chosen: tuple[int, ...], features: Sequence[int], threshold: float
    ) -> list[tuple[int, tuple[int, ...], bool]]:
        """Each feature, what is left without it if all guesses before were right, and whether it will be dropped."""
        found = []
        for feature in features:
            without = _without(chosen, feature)
            drop = self._rise[feature] < threshold
            found.append((feature, without, drop))
            if drop:
                chosen = without
        return found

    def _effects(self, sets: Sequence[tuple[int, ...]]) -> list[Effect]:
        """What is known of a set is not computed again, such as in a sweep that follows one which dropped nothing."""
        fresh = [chosen for chosen in sets if frozenset(chosen) not in self._known]
        if fresh:
            self.rounds += 1
            for chosen, effect in zip(fresh, self._evaluate(fresh), strict=True):
                self._known[frozenset(chosen)] = effect
        return [self._known[frozenset(chosen)] for chosen in sets]


def _without(chosen: tuple[int, ...], feature: int) -> tuple[int, ...]:
    return tuple(other for other in chosen if other != feature)
