"""Rules, counts and tables of the trade-offs, on small trained dictionaries."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from steer_server.dictionary.dictionary import Dictionary
from steer_server.dictionary.files import StoredDictionary, load
from tests.unit.trainer_model import tiny_config, write_model
from trainer.compare import likeness
from trainer.config import TrainConfig
from trainer.errors import BadConfig
from trainer.paper.config import InterpretabilitySettings, PaperConfig, TradeOffSettings
from trainer.paper.lab import Lab
from trainer.paper.page import Verdict, write_page
from trainer.paper.results import Results
from trainer.paper.tradeoffs.experiment import experiment, folders
from trainer.paper.tradeoffs.likeness import _floor, seeds
from trainer.paper.tradeoffs.moments import MOMENTS, correlations, scored
from trainer.paper.tradeoffs.quality import ALIVE, dead
from trainer.paper.tradeoffs.verdicts import alike, correlated, falls, modest, more_dead
from trainer.run import run
from trainer.stop import Stop

pytestmark = pytest.mark.usefixtures("one_thread")

YES, PARTLY, NO = Verdict.REPRODUCED, Verdict.DIFFERS, Verdict.NOT_REPRODUCED
NONE = Verdict.NOT_MEASURED


@pytest.mark.parametrize(
    ("verdict", "expected"),
    [
        (falls([[(9, 0.1), (1, 0.5), (4, 0.3)], [(2, 0.2), (3, 0.1)]]), YES),
        (falls([[(1, 0.5), (4, 0.3), (9, 0.4), (20, 0.2)]]), PARTLY),
        (falls([[(1, 0.5), (4, 0.5)]]), NO),
        (falls([[(1, 0.5)]]), NONE),
        (falls([]), NONE),
        (more_dead([(50, 4), (5, 0)]), YES),
        (more_dead([(50, 4), (4, 4)]), PARTLY),
        (more_dead([(1, 0), (5, 4)]), NO),
        (more_dead([]), NONE),
        (alike([(0.6, 0.3), (0.5, 0.1)]), YES),
        (alike([(0.6, 0.3), (0.2, 0.15)]), PARTLY),
        (alike([(0.6, 0.3), (0.1, 0.1)]), NO),
        (alike([]), NONE),
        (modest([1.6, 9.0]), YES),
        (modest([2.5]), PARTLY),
        (modest([2.6]), NO),
        (modest([]), NONE),
        (correlated([(0.2, 0.01), (0.3, 0.04)]), YES),
        (correlated([(0.2, 0.01), (0.3, 0.06)]), PARTLY),
        (correlated([(-0.2, 0.01), (0.3, 0.5)]), NO),
        (correlated([]), NONE),
    ],
)
def test_verdicts_follow_their_rules(verdict: Verdict, expected: Verdict) -> None:
    assert verdict is expected


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two alphas at two sites, two seeds, random directions, and a dictionary of a random model."""
    folder = tmp_path_factory.mktemp("tradeoffs")
    config = tiny_config(write_model(folder / "model"), folder)

    def out(name: str, **changes: object) -> TrainConfig:
        return replace(config, out=str(folder / name), **changes)  # type: ignore[arg-type]

    run(
        [
            out(f"alphas/{site}-{alpha}", site=site, alpha=alpha)
            for site in ("resid_post.1", "mlp_out.1")
            for alpha in (1e-2, 1e-1)
        ]
        + [out("sizes/other", seed=1), out("sizes/wide", n_features=30)],
        folder / "runs",
        Stop(),
    )
    run([out("random", architecture="random", n_features=16, alpha=0.0)], folder / "runs", Stop())
    run([out("control", weights="random")], folder / "runs", Stop())
    return folder


def settings(folder: Path, **changes: object) -> PaperConfig:
    tables = {"dictionaries": ("alphas", "random", "control"), "alike": ("sizes", "control")}
    chosen = {
        key: tuple(str(folder / name) for name in names)
        for key, names in (tables | changes).items()  # type: ignore[operator]
    }
    return PaperConfig(
        model=str(folder / "model"),
        out=str(folder / "report"),
        corpus={str(folder / "text.jsonl"): 1.0},
        threads=1,
        tradeoffs=TradeOffSettings(**chosen),
    )


def stored(folder: Path, name: str) -> StoredDictionary:
    return load(folder / name)


def test_a_folder_of_dictionaries_stands_for_all_in_it(folder: Path) -> None:
    found = folders([str(folder / "sizes"), str(folder / "random"), str(folder / "sizes/wide")])

    assert found == [str(folder / name) for name in ("sizes/other", "sizes/wide", "random")]
    assert folders(["nowhere"]) == ["nowhere"]


def test_a_feature_is_alive_from_eleven_activations_on(folder: Path) -> None:
    one = stored(folder, "random")
    tokens = one.card.training["tokens"]
    counts = torch.tensor([ALIVE, ALIVE + 1] * 8)
    statistics = one.statistics._replace(density=counts / tokens)

    assert dead(replace(one, statistics=statistics)) == 8


def test_seeds_are_of_trainings_that_differ_in_nothing_else(folder: Path) -> None:
    first, other = stored(folder, "alphas/resid_post.1-0.01"), stored(folder, "sizes/other")

    assert seeds(first, other)
    assert not seeds(first, first)
    for name in ("sizes/wide", "control", "alphas/resid_post.1-0.1", "alphas/mlp_out.1-0.01"):
        assert not seeds(other, stored(folder, name))


def test_the_tables_hold_what_the_cards_say(folder: Path) -> None:
    section = experiment(Lab(settings(folder), Stop()))

    sparsity, dead_ones, perplexity = section.findings[:3]
    points = {}
    for name in ("resid_post.1-0.01", "resid_post.1-0.1"):
        quality = stored(folder, f"alphas/{name}").card.quality
        assert quality is not None
        assert quality.ce is not None
        points[name] = quality
        (row,) = [r for r in sparsity.tables[0].rows if r[0] == f"alphas/{name}"]
        assert row[5:7] == [f"{quality.l0:.1f}", f"{quality.fvu:.3f}"]
        (row,) = [r for r in perplexity.tables[0].rows if r[0] == f"alphas/{name}"]
        spliced = math.exp(quality.ce + quality.delta_ce)
        assert row[3:5] == [f"{math.exp(quality.ce):.2f}", f"{spliced:.2f}"]
    assert f"{points['resid_post.1-0.1'].fvu:.3f} at L0" in sparsity.because
    assert "mlp_out" not in "".join(row[1] for row in perplexity.tables[0].rows)
    assert dead_ones.because.count(" and ") >= 2
    for finding in section.findings:
        assert any("untrained model" in row[0] for row in finding.tables[0].rows)
    write_page("trade-offs", "", [section], folder / "page.html")
    assert (folder / "page.html").read_text().count("<svg") == 2


def test_likeness_is_of_each_to_each_and_to_random_directions(folder: Path) -> None:
    config = settings(folder, alike=("alphas/resid_post.1-0.01", "sizes", "control"))

    finding = experiment(Lab(config, Stop())).findings[3]

    rows = {(row[0], row[1]): row[2] for row in finding.tables[0].rows}
    one, other = stored(folder, "alphas/resid_post.1-0.01"), stored(folder, "sizes/other")
    expected = likeness(one.dictionary.W_dec, other.dictionary.W_dec).mmcs
    assert rows["alphas/resid_post.1-0.01", "sizes/other"] == f"{expected:.3f}"
    assert len(rows) == 4 * 3 + 4
    assert f"{expected:.3f} with 24 features (random" in finding.because
    floor = rows["sizes/other", "random directions, as many"]
    assert float(floor) < expected


def test_the_floor_is_not_made_of_a_trainings_first_weights(folder: Path, tmp_path: Path) -> None:
    config = replace(settings(folder), out=str(tmp_path))
    first = torch.randn(16, 16, generator=torch.Generator().manual_seed(config.seed))
    begun = replace(stored(folder, "random"), dictionary=Dictionary.directions(first))

    assert _floor(Lab(config, Stop()), begun).mmcs < 0.9


def test_dictionaries_of_several_sites_are_not_compared(folder: Path) -> None:
    with pytest.raises(BadConfig, match="several sites"):
        experiment(Lab(settings(folder, alike=("alphas",)), Stop()))


def test_without_dictionaries_there_are_no_trade_offs(folder: Path) -> None:
    with pytest.raises(BadConfig, match=r"tradeoffs\.dictionaries is empty"):
        experiment(Lab(settings(folder, dictionaries=()), Stop()))


def write_scores(folder: Path, name: str, scores: list[float | None], weights: str) -> None:
    rows = [
        {
            "feature": number,
            "scores": {"top_and_random": score, "top": 1.0},
            "moments": {moment: float(number**power) for power, moment in enumerate(MOMENTS, 1)},
        }
        for number, score in enumerate(scores)
    ]
    path = folder / "interpretability" / name
    path.parent.mkdir(parents=True)
    kind = "pca" if "pca" in path.parent.name else "top_k"
    result = {
        "dictionary": f"x/{path.parent.name}",
        "architecture": kind,
        "weights": weights,
        "features": rows,
    }
    path.write_text(json.dumps({"settings": {}, "result": result}))


def test_interpretability_is_joined_if_it_was_measured(folder: Path, tmp_path: Path) -> None:
    order = InterpretabilitySettings(dictionaries=("y/x/pca", "y/x/one", "y/x/another"))
    config = replace(settings(folder), out=str(tmp_path), interpretability=order)
    before = experiment(Lab(config, Stop()))
    rising = [0.1 * number for number in range(10)]
    write_scores(tmp_path, "a/one/rule.json", [*rising, None], "trained")
    write_scores(tmp_path, "control/rule.json", rising[::-1], "random")
    write_scores(tmp_path, "a/another/rule.json", [*rising[::-1], 1.0], "trained")
    write_scores(tmp_path, "a/pca/rule.json", [*rising[::-1], 1.0, 1.1], "trained")

    after = experiment(Lab(config, Stop()))

    assert "interpretability` was not run" in before.about
    assert len(after.findings) == len(before.findings) + 1
    assert "was not run" not in after.about
    finding = after.findings[-1]
    assert finding.verdict is YES
    assert "for x/one by rule" in finding.because
    rows = {(row[0], row[2]): row[3:] for row in finding.tables[0].rows}
    assert rows["x/one", "mean"] == ["10", "+1.00", "0.000", "+1.00"]
    assert rows["x/control (untrained model)", "mean"][1] == "-1.00"


@pytest.mark.parametrize("scores", [[0.1, 0.2, None], [None]])
def test_a_dictionary_with_few_scores_has_no_correlation(
    tmp_path: Path, scores: list[float | None]
) -> None:
    write_scores(tmp_path, "a/one/rule.json", scores, "trained")

    finding = correlations(
        scored(Results(tmp_path / "interpretability"), InterpretabilitySettings())
    )

    assert finding.verdict is NONE
    assert {tuple(row[4:]) for row in finding.tables[0].rows} == {("-", "-", "-")}


def test_other_files_of_the_experiment_are_passed_over_and_broken_ones_named(
    tmp_path: Path,
) -> None:
    part = tmp_path / "interpretability" / "one" / "feature.json"
    part.parent.mkdir(parents=True)
    part.write_text(json.dumps({"settings": {}, "result": {"feature": 3}}))
    assert scored(Results(tmp_path / "interpretability"), InterpretabilitySettings()) == []

    part.write_text(json.dumps({"settings": {}, "result": {"features": [{"feature": 3}]}}))
    with pytest.raises(BadConfig, match=r"feature\.json is not a result .* run that anew"):
        scored(Results(tmp_path / "interpretability"), InterpretabilitySettings())
