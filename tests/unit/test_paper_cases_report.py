"""The case studies as a whole: what is chosen, what is shown, what is kept."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.unit.trainer_model import tiny_config, write_model
from trainer.errors import BadConfig
from trainer.paper.cases.activates import (
    LEAST,
    Kinds,
    Rating,
    commonest,
    fullest_at,
    histogram,
    ratings,
    strongest_at,
)
from trainer.paper.cases.activity import Activity
from trainer.paper.cases.draw import causal_tree, shown
from trainer.paper.cases.experiment import experiment
from trainer.paper.cases.study import Study
from trainer.paper.cases.tree import Node
from trainer.paper.cases.verdicts import Change, answer_falls, caused, monosemantic, specific
from trainer.paper.config import CaseSettings, PaperConfig
from trainer.paper.lab import Lab
from trainer.paper.page import Verdict, write_page
from trainer.run import run
from trainer.stop import Stop

pytestmark = pytest.mark.usefixtures("one_thread")

YES, PARTLY, NO = Verdict.REPRODUCED, Verdict.DIFFERS, Verdict.NOT_REPRODUCED


def activity(*columns: list[float]) -> Activity:
    """Of features by their activations on the tokens of a text."""
    f = torch.tensor(columns)
    feature, places = f.nonzero(as_tuple=True)
    starts = torch.bincount(feature, minlength=len(f)).cumsum(dim=0)
    starts = torch.cat([starts.new_zeros(1), starts])
    return Activity(places.int(), f[feature, places], starts, f.shape[1])


def test_case_and_spaces_make_no_other_kind() -> None:
    kinds = Kinds([" The", "the", "\n", "(", " ("])

    assert kinds.of.tolist() == [0, 0, 1, 2, 2]
    assert kinds.names == ["the", "'\\n'", "("]


def test_a_rating_is_of_activations_from_half_the_maximum_on() -> None:
    strong = [4.0] * 15 + [2.0] * 10
    kinds = torch.tensor([0] * 15 + [1] * 10 + [1] * 20 + [1] * 5)
    f = activity([*strong, *[1.9] * 20, *[9.0] * 5], [1.0] * (LEAST - 1) + [0.0] * 31)

    # The last five, with the largest activations of all, are behind what is looked at.
    (found,) = ratings(f, kinds[:45], ["a", "b"])

    assert found == Rating(0, "a", 0.6, 25, 4.0, 1.0)


def test_the_commonest_kinds_are_of_strong_activations() -> None:
    f = activity([4.0, 4.0, 2.0, 1.0, 1.0, 1.0])
    kinds = torch.tensor([1, 1, 0, 2, 2, 2])

    assert commonest(f, 0, kinds, ["a", "b", "c"]) == [
        ("b", pytest.approx(2 / 3)),
        ("a", pytest.approx(1 / 3)),
    ]


def test_a_histogram_has_each_token_in_its_range() -> None:
    f = activity([0.5, 1.0, 2.6, 3.0, 4.0, 0.0])
    kinds = torch.tensor([0, 1, 1, 1, 0, 0])

    found = histogram(f, 0, kinds, ["a", "b"], 4)

    assert found["counts"] == [1, 1, 1, 2]
    shares = dict(zip(found["kinds"], found["shares"], strict=True))
    assert shares == {"a": [1.0, 0.0, 0.0, 0.5], "b": [0.0, 1.0, 1.0, 0.5]}


def test_features_of_every_token_are_passed_over() -> None:
    f = activity([1.0] * 10, [3.0] + [0.0] * 9, [2.0] * 10)

    found = strongest_at(torch.tensor([9.0, 1.0, 8.0]), f, dense=0.5, most=1)

    assert found == [(0, 9.0, 1.0, True), (2, 8.0, 1.0, True), (1, 1.0, pytest.approx(0.1), False)]


def test_the_fullest_coordinate_is_nearest_its_own_maximum() -> None:
    f = activity([100.0, 1.0], [2.0, 1.0], [0.0, 0.0])

    assert fullest_at(torch.tensor([60.0, 1.8, 5.0]), f) == (1, pytest.approx(0.9))


@pytest.mark.parametrize(
    ("verdict", "expected"),
    [
        (monosemantic(0.9, 0.4), YES),
        (monosemantic(0.9, 0.6), PARTLY),
        (monosemantic(0.4, 0.1), PARTLY),
        (monosemantic(0.2, 0.3), NO),
        (answer_falls([Change(2.0, 900, 0.1, 0.0), Change(-0.05, 1, 0.0, 0.0)]), YES),
        (answer_falls([Change(2.0, 900, 0.1, 0.0), Change(-2.0, 7, -0.9, 0.1)]), PARTLY),
        (answer_falls([Change(-2.0, 7, -0.9, -0.8)]), NO),
        (answer_falls([Change(-2.0, 7, -0.05, 0.0)]), NO),
        (answer_falls([Change(0.3, 1, 0.0, 0.0)]), NO),
        (specific([(-0.5, 0.1), (-0.2, -0.01)]), YES),
        (specific([(-0.5, 0.1), (-0.5, -0.4)]), PARTLY),
        (specific([(-0.09, 0.0)]), NO),
        (specific([]), Verdict.NOT_MEASURED),
        (caused(0.5, 0.4, 0.01), YES),
        (caused(0.5, None, 0.01), YES),
        (caused(0.5, 0.06, 0.001), PARTLY),
        (caused(0.5, 0.5, 0.3), PARTLY),
        (caused(0.5, 0.0, 0.001), NO),
    ],
)
def test_verdicts_follow_their_rules(verdict: Verdict, expected: Verdict) -> None:
    assert verdict is expected


def test_tokens_are_written_so_that_all_of_them_is_seen() -> None:
    assert [shown(text) for text in (" the", "\n", "$1$", "漢")] == [
        "“ the”",
        "\\n",
        "\\$1\\$",
        "\\u6f22",
    ]


def test_the_tree_is_drawn_with_all_its_nodes_and_edges() -> None:
    leaf = Node("attn_out.2", 7, [("cat", 0.5)], 0.25, 0.125, [])
    root = Node("resid_post.2", 3, [("$", 1.0)], 0.0, None, [leaf, leaf._replace(feature=8)])

    svg = causal_tree(root, "a tree").svg

    assert svg.count("attn_out.2 #") == 2
    assert svg.count("-25% (-12%)") == 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cases")
    config = tiny_config(write_model(folder / "model"), folder)
    sites = ("resid_post.1", "attn_out.2", "mlp_out.2", "resid_post.2")
    configs = [
        replace(config, site=s, out=str(folder / s), tokens=2048, skip_positions=1) for s in sites
    ]
    run(configs, folder / "runs", Stop())
    return folder


def settings(folder: Path, **cases: object) -> PaperConfig:
    chosen: dict[str, object] = {
        "dictionary": str(folder / "resid_post.2"),
        "parents": tuple(str(folder / s) for s in ("resid_post.1", "attn_out.2", "mlp_out.2")),
        "sentence": "the old dog",
        "answer": "ran",
        "tree_token": "cat",
        "tokens": 500,
        "context": 16,
        "dense": 1.0,
        "contexts": 4,
        "candidates": 3,
        "effects": 2,
        "branches": 1,
    }
    return PaperConfig(
        model=str(folder / "model"),
        out=str(folder / "report"),
        corpus={str(folder / "text.jsonl"): 1.0},
        holdout_every=10,
        threads=1,
        cases=CaseSettings(**(chosen | cases)),  # type: ignore[arg-type]
    )


def test_the_report_is_made_once_and_then_needs_no_model(folder: Path) -> None:
    config = settings(folder)

    first = experiment(Lab(config, Stop()))
    weights = folder / "model" / "model.safetensors"
    weights.rename(folder / "away")
    second = experiment(Lab(config, Stop()))
    (folder / "away").rename(weights)

    assert [finding.title for finding in first.findings] == [
        "What activates a feature",
        "What the sentence's feature does",
        "What other features do",
        "What causes a feature",
    ]
    assert [f._replace(figures=()) for f in second.findings] == [
        f._replace(figures=()) for f in first.findings
    ]
    tree = first.findings[3].tables[1].rows
    assert tree[0][0].startswith("resid_post.2 #")
    assert len(tree) > 1
    write_page("cases", "", [first], folder / "page.html")
    assert (folder / "page.html").read_text().count("<svg") >= 4


def test_other_settings_are_computed_anew(folder: Path) -> None:
    experiment(Lab(settings(folder), Stop()))
    path = folder / "report" / "cases" / "activates.json"
    before = json.loads(path.read_text())

    experiment(Lab(settings(folder, bins=4), Stop()))

    after = json.loads(path.read_text())
    assert len(before["result"]["feature_histogram"]["counts"]) == 10
    assert len(after["result"]["feature_histogram"]["counts"]) == 4


def test_contexts_of_a_feature_are_those_where_it_is_strong(folder: Path) -> None:
    study = Study(Lab(settings(folder), Stop()))
    feature = study.rated[0].feature
    activity = study.activity(study.stored)
    places, values = activity.of(feature)
    strong = set(places[values >= activity.maximum(feature) / 2].tolist())
    length = study.contexts.shape[1]
    expected = {
        tuple(study.contexts[place // length, : place % length + 1].tolist())
        for place in strong
        if place >= study.half
    }

    found = study.sample(study.stored, feature, study.half, study.contexts.numel(), 10_000)
    few = study.sample(study.stored, feature, study.half, study.contexts.numel(), 3)

    assert {tuple(tokens.tolist()) for tokens in found} == expected
    assert [tokens.tolist() for tokens in few] == [tokens.tolist() for tokens in found[:3]]


def test_a_parent_of_no_earlier_site_is_refused(folder: Path) -> None:
    config = settings(
        folder, dictionary=str(folder / "attn_out.2"), parents=(str(folder / "mlp_out.2"),)
    )

    with pytest.raises(BadConfig, match=r"mlp_out\.2, which is not before attn_out\.2"):
        Study(Lab(config, Stop()))


def test_a_sentence_of_dense_features_only_is_refused(folder: Path) -> None:
    with pytest.raises(BadConfig, match="take another sentence"):
        _ = Study(Lab(settings(folder, dense=0.0), Stop())).activates


def test_settings_out_of_range_are_named() -> None:
    with pytest.raises(BadConfig, match=r"cases\.bins is 0, it must be above 0"):
        CaseSettings(bins=0)
