"""Records, scores and explainers against OpenAI's own code, run once on a made-up neuron, and against their definitions."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from trainer.paper.interpretability import neuron_explainer
from trainer.paper.interpretability.classify import detection, fuzzing, right
from trainer.paper.interpretability.explainers import RULES, Simulation
from trainer.paper.interpretability.records import (
    Chosen,
    Record,
    Records,
    choose,
    per_split,
    quantise,
    records,
)
from trainer.paper.interpretability.sample import Moments, moments
from trainer.paper.interpretability.scores import auroc, balanced_accuracy, mean, score


@pytest.fixture(scope="module")
def theirs() -> dict[str, Any]:
    return json.loads(Path(__file__).with_name("neuron_explainer.json").read_text())


@pytest.fixture(scope="module")
def made_up(theirs: dict[str, Any]) -> Records:
    """The neuron's fragments in our form."""

    def listed(name: str) -> list[Record]:
        return [Record(tuple(r["tokens"]), tuple(r["activations"])) for r in theirs["neuron"][name]]

    top, random = listed("most_positive_activation_records"), listed("random_sample")
    return Records(Chosen([], [], [], [], []), top, random, [], [], [])


def simulations(sequences: list[dict[str, Any]]) -> list[Simulation]:
    names = ("expected_activations", "distribution_values", "distribution_probabilities")
    return [Simulation(*(s["simulation"][name] for name in names)) for s in sequences]


def test_splits_and_levels_are_those_of_openais_code(
    theirs: dict[str, Any], made_up: Records
) -> None:
    where = {id(r): ["top", n] for n, r in enumerate(made_up.top)}
    where |= {id(r): ["random", n] for n, r in enumerate(made_up.random)}
    valid = [*made_up.scored_top, *made_up.scored_random]

    assert [where[id(r)] for r in made_up.train] == theirs["train"]
    assert [where[id(r)] for r in valid] == theirs["valid"]
    assert made_up.max_train == theirs["train_max"]
    assert [quantise(r.activations, made_up.max_train) for r in valid] == theirs["normalised"]
    assert quantise([0.5, 0.0], 0.0) == theirs["normalised_of_nothing"]


def test_scores_and_records_are_those_of_openais_code(
    theirs: dict[str, Any], made_up: Records
) -> None:
    expected = theirs["results"]["scored_explanations"][0]["scored_simulation"]
    made = simulations(expected["scored_sequence_simulations"])
    valid = [*made_up.scored_top, *made_up.scored_random]
    nothing = Moments(0.0, math.nan, math.nan, math.nan, math.nan)

    results = neuron_explainer.simulation_results(10, 7, "animals", valid, made)
    neuron = neuron_explainer.neuron_record(10, 7, made_up, nothing)

    assert_same(results, theirs["results"])
    unknown = dict.fromkeys(("mean", "variance", "skewness", "kurtosis"))
    assert neuron | unknown == theirs["neuron"]
    for kind, part in (("top_and_random", slice(10)), ("top", slice(5)), ("random", slice(5, 10))):
        found = score([r.activations for r in valid[part]], [s.expected for s in made[part]])
        assert list(found) == pytest.approx(list(theirs[kind].values()))


def assert_same(ours: Any, theirs: Any) -> None:
    """Equal, numbers up to rounding."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for name in theirs:
            assert_same(ours[name], theirs[name])
    elif isinstance(theirs, list):
        for left, right_ in zip(ours, theirs, strict=True):
            assert_same(left, right_)
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs)
    else:
        assert ours == theirs


def test_a_constant_simulation_has_no_correlation_and_counts_as_nothing(
    theirs: dict[str, Any], made_up: Records
) -> None:
    valid = [*made_up.scored_top, *made_up.scored_random]

    found = score([r.activations for r in valid], [[2.0] * len(r.tokens) for r in valid])

    assert found.correlation is theirs["constant_simulation"]["ev_correlation_score"] is None
    assert found.r_squared == pytest.approx(theirs["constant_simulation"]["rsquared_score"])
    assert score([[0.0, 0.0]], [[1.0, 2.0]]) == (None, None, None)
    assert mean([0.5, None, 1.0]) == pytest.approx((0.5, 1.96 * 0.5 / math.sqrt(3), 3, 1))
    assert mean([0.5]) is None


def test_fragments_are_drawn_as_said() -> None:
    generator = torch.Generator().manual_seed(0)
    peaks = torch.zeros(100)
    peaks[torch.randperm(100, generator=generator)[:40]] = torch.rand(40, generator=generator) + 0.1
    peaks[7] = peaks[8] = 2.0
    firing = set((peaks > 0).nonzero().squeeze(1).tolist())

    chosen = choose(peaks, 20, generator)

    assert chosen is not None
    assert chosen.top[:2] == [7, 8]
    assert peaks[chosen.top].tolist() == sorted(peaks.tolist(), reverse=True)[:20]
    assert len(set(chosen.random)) == 20
    assert set(chosen.random) <= firing
    assert set(chosen.random) & set(chosen.top)
    assert len(set(chosen.fresh)) == per_split(20) == 5
    assert set(chosen.fresh) <= firing - set(chosen.top)
    assert len(set(chosen.any)) == 5
    assert not set(chosen.any) & set(chosen.top)
    assert len(set(chosen.silent)) == 10
    assert not set(chosen.silent) & firing
    peaks[list(firing)[:18]] = 0.0
    assert (choose(peaks, 20, generator) is None) == (int((peaks > 0).sum()) < 25)
    assert choose(peaks.clamp(max=0.0), 20, generator) is None


def test_every_feature_is_active_in_all_fragments_then_none_is_silent() -> None:
    chosen = choose(torch.ones(30), 20, torch.Generator())

    assert chosen is not None
    assert chosen.silent == []
    text = [["a"]] * 30
    found = records(chosen, torch.ones(30, 1), text)
    explanation = RULES["token"].explain(found.train, found.max_train)
    assert detection(explanation, found) == (None, None)
    assert fuzzing(explanation, found, torch.Generator()) == (None, None)


TRAIN = [
    Record((" The", " cat", " sat"), (0.0, 8.0, 0.0)),
    Record(("a", "Cat", " the"), (0.0, 4.0, 1.0)),
]


def test_the_rule_of_tokens_is_a_table_of_means() -> None:
    explanation = RULES["token"].explain(TRAIN, 8.0)

    (found,) = explanation.simulate([["cat", " THE", " dog", " sat"]])

    assert found.expected == [7.5, 0.5, 0.0, 0.0]
    assert found.values == [[7.5], [0.5], [0.0], [0.0]]
    assert explanation.text == "cat 7.5, the 0.5"
    assert explanation.detects([[" dog"], ["cat", " dog"]]) == [0.0, 7.5]
    marks = [[True, True, False], [False, True, False]]
    assert explanation.agrees([["cat", "the", "dog"], ["dog", "cat", "dog"]], marks) == [0.5, 7.5]


def test_the_rule_of_pairs_knows_what_came_before() -> None:
    explanation = RULES["token+previous"].explain(TRAIN, 8.0)

    (found,) = explanation.simulate([["the", "cat", "the", "sat", "cat"]])

    assert found.expected == [0.0, 10.0, 1.0, 0.0, 7.5]
    assert explanation.text == "the cat 10, a cat 5, cat the 1"
    assert RULES["token"].explain([Record(("a",), (0.0,))], 0.0).text == "no token"


def test_detection_and_fuzzing_are_by_definition() -> None:
    def fragment(token: str, f: float) -> Record:
        return Record((" x", token, " y", " z"), (0.0, f, 0.2 * f, 0.0))

    top = [fragment(" cat", 9.0 - n / 10) for n in range(20)]
    random = [fragment(" dog" if n == 4 else " cat", 2.0) for n in range(20)]
    silent = [Record((" x", " cat" if n == 0 else " w", " y", " z"), (0.0,) * 4) for n in range(10)]
    found = Records(Chosen([], [], [], [], []), top, random, [], [], silent)
    explanation = RULES["token"].explain([Record((" cat", " x"), (1.0, 0.0))], 1.0)

    told = detection(explanation, found)
    fuzzed = fuzzing(explanation, found, torch.Generator().manual_seed(0))

    assert told == pytest.approx((0.9, 0.9))
    assert right(top[0]) == [False, True, False, False]
    # Two marked tokens of four in a fragment without the feature: cat and another, or two others.
    assert fuzzed == pytest.approx((0.95, 0.95))


def test_accuracy_and_auroc_are_scikit_learns() -> None:
    generator = torch.Generator().manual_seed(3)
    values = torch.randint(0, 6, (40,), generator=generator).tolist()
    labels = torch.randint(0, 2, (40,), generator=generator).tolist()
    pairs = [
        [v for v, label in zip(values, labels, strict=True) if label == wanted] for wanted in (1, 0)
    ]

    assert auroc(*pairs) == pytest.approx(roc_auc_score(labels, values))
    yes = [[value > 2 for value in part] for part in pairs]
    expected = balanced_accuracy_score(labels, [value > 2 for value in values])
    assert balanced_accuracy(*yes) == pytest.approx(expected)
    assert auroc([], [1.0]) is None


def test_moments_are_scipys() -> None:
    from scipy import stats

    f = torch.rand(500, 2, generator=torch.Generator().manual_seed(4)).sub(0.6).clamp(min=0.0) ** 2

    for column, found in zip(f.T.double().numpy(), moments(f), strict=True):
        expected = [
            (column > 0).mean(),
            column.mean(),
            column.var(),
            stats.skew(column),
            stats.kurtosis(column, fisher=False),
        ]
        assert list(found) == pytest.approx(expected)
