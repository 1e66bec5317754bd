"""The verdicts on curves, by hand-made curves."""

import pytest

from trainer.paper.ioi.section import levels, needed, section, verdict, wins
from trainer.paper.page import Verdict


def curve(name: str, kls: list[float], sizes: list[int], **more):
    effects = [
        {"kl": kl, "edit": float(size), "changed": size / 2}
        for kl, size in zip(kls, sizes, strict=True)
    ]
    return {
        "name": name,
        "site": "resid_post.1",
        "features": 100,
        "differing": sizes[-1],
        "alpha": 0.0,
        "sizes": sizes,
        "prompts": effects,
        "heldout": effects,
    } | more


STEEP = curve("ours", [4.0, 2.0, 1.0, 0.5], [0, 1, 2, 4])
FLAT = curve("x/pca-k0", [4.0, 3.0, 2.0, 1.0], [0, 1, 2, 4])


def test_a_level_is_reached_between_two_points():
    assert needed(STEEP, 3.0, "size") == 0.5
    assert needed(STEEP, 2.0, "size") == 1.0
    assert needed(STEEP, 0.75, "size") == 3.0
    assert needed(STEEP, 0.4, "size") is None
    assert needed(STEEP, 5.0, "size") == 0


def test_a_curve_that_rises_again_counts_by_its_least_kl_so_far():
    wave = curve("wave", [4.0, 2.0, 3.0, 1.0], [0, 1, 2, 3])

    assert needed(wave, 2.5, "size") == 0.75
    assert needed(wave, 1.5, "size") == 2.0


def test_levels_are_those_that_all_reach():
    found = levels([STEEP, FLAT])

    assert found[-1] == pytest.approx(1.0)
    assert all(
        needed(curve, level + 1e-9, "size") is not None
        for curve in (STEEP, FLAT)
        for level in found
    )
    assert levels([STEEP, curve("never", [4.0, 5.0], [0, 1])]) == []


@pytest.mark.parametrize(
    ("mine", "other", "expected"), [(STEEP, FLAT, 12), (FLAT, STEEP, 0), (FLAT, FLAT, 0)]
)
def test_the_steeper_curve_wins_at_every_level(mine, other, expected: int):
    assert wins(mine, [other], "size") == (expected, 12)


def test_the_verdict_follows_from_what_was_won():
    assert [verdict(*pair) for pair in ((12, 12), (5, 12), (0, 12), (0, 0))] == [
        Verdict.REPRODUCED,
        Verdict.DIFFERS,
        Verdict.NOT_REPRODUCED,
        Verdict.NOT_MEASURED,
    ]


def test_a_section_says_which_claims_hold():
    alphas = [
        curve("a/sparse", [4.0, 0.3], [0, 3], alpha=0.01),
        curve("a/dense", [4.0, 0.2], [0, 3], alpha=0.001),
        curve("a/wide", [4.0, 0.1], [0, 3], alpha=0.1, features=200),
    ]
    search = {
        "name": "ours",
        "features": 100,
        "differing": 4,
        "candidates": 4,
        "one_by_one": 500,
        "evaluated": 60,
        "rounds": 50,
        "whole": {"kl": 0.5, "edit": 4.0},
        "nothing": {"kl": 4.0, "edit": 0.0},
        "points": [{"threshold": 0.1, "features": [1, 2], "kl": 1.0, "edit": 2.0}],
    }
    served = {
        "name": "ours",
        "prompts": 2,
        "rows": [{"size": 1, "here": {"kl": 2.0, "edit": 1.0}, "there": {"kl": 2.02, "edit": 1.0}}],
    }

    found = section([STEEP, FLAT, *alphas], [search], served).findings

    by_title = {finding.title: finding for finding in found}
    assert by_title["Fewer patches than PCA"].verdict == Verdict.REPRODUCED
    assert by_title["Sparser dictionaries reach less far"].verdict == Verdict.REPRODUCED
    assert by_title["The subset search"].verdict == Verdict.DIFFERS
    assert "10 times fewer" in by_title["The subset search"].because
    assert by_title["The same through the server"].verdict == Verdict.NOT_REPRODUCED
    assert all("<svg" in figure.svg for finding in found for figure in finding.figures)


def test_a_larger_l1_weight_that_reaches_further_is_not_as_in_the_paper():
    alphas = [
        curve("a/sparse", [4.0, 0.1], [0, 3], alpha=0.01),
        curve("a/dense", [4.0, 0.2], [0, 3], alpha=0.001),
    ]

    found = {finding.title: finding for finding in section(alphas, [], None).findings}

    reach = found["Sparser dictionaries reach less far"]
    assert reach.verdict == Verdict.NOT_REPRODUCED
    assert "in 0 of 1 pairs" in reach.because
