"""The batched search finds the sets of the search one by one."""

import itertools
import random

import pytest

from trainer.paper.ioi.patching import Effect
from trainer.paper.ioi.search import Evaluate, Point, Search

THRESHOLDS = (0.01, 0.1, 1.0, 10.0)


def additive(weights: dict[int, float]) -> Evaluate:
    """The KL is the sum of the weights of what is not patched."""

    def evaluate(sets):
        return [
            Effect(sum(w for f, w in weights.items() if f not in chosen), float(len(chosen)))
            for chosen in sets
        ]

    return evaluate


def tangled(seed: int, count: int) -> Evaluate:
    """Features matter alone and in pairs, and some make the KL worse."""
    draw = random.Random(seed)
    alone = [draw.gauss(0.02, 0.1) for _ in range(count)]
    pairs = {pair: draw.gauss(0, 0.1) for pair in itertools.combinations(range(count), 2)}

    def evaluate(sets):
        found = []
        for chosen in sets:
            gone = set(range(count)) - set(chosen)
            loss = sum(alone[f] for f in gone)
            loss += sum(w for pair, w in pairs.items() if gone.issuperset(pair))
            found.append(Effect(abs(loss), float(len(chosen))))
        return found

    return evaluate


def literal(evaluate: Evaluate, candidates: list[int], thresholds, seed: str) -> list[Point]:
    """The search as the paper writes it, a run for each feature."""
    draw = random.Random(seed)
    chosen, points = tuple(candidates), []
    kl = evaluate([chosen])[0].kl
    for threshold in thresholds:
        for feature in draw.sample(chosen, len(chosen)):
            without = tuple(other for other in chosen if other != feature)
            (effect,) = evaluate([without])
            if effect.kl - kl < threshold:
                chosen, kl = without, effect.kl
        points.append(Point(threshold, chosen, evaluate([chosen])[0]))
    return points


def test_a_feature_goes_at_the_first_threshold_above_what_it_is_worth():
    search = Search(additive({1: 0.005, 2: 0.05, 3: 0.5, 4: 5.0}), [1, 2, 3, 4], "0", batch=3)

    points = search.run(THRESHOLDS, lambda: None)

    assert [set(point.features) for point in points] == [{2, 3, 4}, {3, 4}, {4}, set()]
    assert [round(point.effect.kl, 3) for point in points] == [0.005, 0.055, 0.555, 5.555]
    assert [point.effect.edit for point in points] == [3, 2, 1, 0]
    assert search.steps == 4 + 3 + 2 + 1


@pytest.mark.parametrize("batch", [1, 4, 16])
@pytest.mark.parametrize("seed", range(6))
def test_batches_select_what_the_search_one_by_one_selects(seed: int, batch: int):
    evaluate = tangled(seed, 12)

    points = Search(evaluate, range(12), "x", batch).run(THRESHOLDS, lambda: None)

    assert points == literal(evaluate, list(range(12)), THRESHOLDS, "x")


def test_good_guesses_save_most_calls():
    weights = {feature: 0.001 if feature % 10 else 1.0 for feature in range(200)}
    search = Search(additive(weights), range(200), "0", batch=32)

    search.run([0.01 * 1.1**step for step in range(40)], lambda: None)

    assert search.steps == 200 + 39 * 20
    assert search.steps > 20 * search.rounds


def test_a_search_can_be_broken_off():
    class Stopped(Exception):
        pass

    def check() -> None:
        raise Stopped

    with pytest.raises(Stopped):
        Search(additive({1: 1.0}), [1], "0", 1).run([0.1], check)
