"""The whole experiment on a tiny model: its fragments and activations by definition, its results kept, its page."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from steer_server.dictionary.files import load
from tests.unit.trainer_model import tiny_config, write_model
from trainer.cli import main
from trainer.errors import BadConfig, BadCorpus, Interrupted
from trainer.model import load_model, read_sites
from trainer.paper.config import InterpretabilitySettings, PaperConfig
from trainer.paper.interpretability import verdicts
from trainer.paper.interpretability.experiment import experiment
from trainer.paper.interpretability.fragments import Activations, cut
from trainer.paper.interpretability.language_model import Endpoint
from trainer.paper.interpretability.measure import Measurement
from trainer.paper.interpretability.sample import draw
from trainer.paper.interpretability.scores import Mean
from trainer.paper.lab import Lab
from trainer.paper.page import Verdict
from trainer.run import run
from trainer.stop import Stop

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, its corpus and dictionaries: the paper's, with a k, baselines, and of random weights."""
    folder = tmp_path_factory.mktemp("trained")
    config = tiny_config(write_model(folder / "model"), folder)
    by_k = {"architecture": "top_k", "alpha": 0.0, "k": 3, "loss_reduction": "sum", "lr": 2e-4}
    plain = {"alpha": 0.0, "loss_reduction": "sum", "n_features": 16}
    for name, changes in {
        "tied": {},
        "top_k": by_k,
        "untrained": {"weights": "random"},
        "random-k0": {**plain, "architecture": "random"},
        "basis-k0": {**plain, "architecture": "basis"},
        "basis-k4": {**plain, "architecture": "basis", "k": 4},
    }.items():
        run([replace(config, out=str(folder / "out" / name), **changes)], folder / "runs", Stop())
    return folder


def paper_config(trained: Path, out: Path, *names: str, **changes: object) -> PaperConfig:
    settings = InterpretabilitySettings(
        dictionaries=tuple(str(trained / "out" / name) for name in names),
        features=6,
        fragments=500,
        fragment_tokens=8,
        stride=9,
        examples=8,
    )
    return PaperConfig(
        model=str(trained / "model"),
        out=str(out),
        corpus={str(trained / "text.jsonl"): 1.0},
        holdout_every=3,
        threads=1,
        interpretability=replace(settings, **changes),
    )


def test_fragments_are_held_out_text_and_activations_those_of_the_whole_model(
    trained: Path, tmp_path: Path
) -> None:
    lab = Lab(paper_config(trained, tmp_path), Stop())
    fragments = cut(lab, 500, 8, 12, 1)
    activations = Activations(tmp_path / "x", fragments)
    model = load_model(str(trained / "model"))
    stored = load(trained / "out" / "top_k")
    (x,) = read_sites(model, [stored.card.site], fragments.tokens.long())
    stored.card.training["max_norm"] = x[:, 1:].norm(dim=-1).quantile(0.9).item()

    activations.collect(lab, model, [stored.card.site], "here")
    sample = draw(stored, activations, 5, 8, 0, Stop())

    heldout = lab.heldout(500 * 12, 12).tolist()
    for row, texts in zip(fragments.tokens.tolist(), fragments.texts, strict=True):
        assert any(row == context[start : start + 9] for context in heldout for start in range(4))
        assert texts == [lab.texts[token] for token in row[1:]]
        assert lab.tokenizer.eos_token_id not in row
    kept = x[:, 1:].norm(dim=-1) <= stored.card.training["max_norm"]
    f = stored.dictionary.encode(x[:, 1:]) * kept[:, :, None]
    assert 0.85 < kept.double().mean() < 0.95
    assert len(sample.features) == 5
    torch.testing.assert_close(sample.activations, f[:, :, sample.features])
    assert sample.eligible == int(((f.amax(dim=1) > 0).sum(dim=0) >= 10).sum())
    assert len(list(model.modules())) == len(list(load_model(str(trained / "model")).modules()))


def test_the_command_scores_all_dictionaries_and_says_what_it_means(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = "tied", "random-k0", "basis-k0", "basis-k4", "untrained"
    folders = [str(trained / "out" / name) for name in names]
    text = (
        f'model = "{trained}/model"\nout = "{tmp_path}/out"\nholdout_every = 3\nthreads = 1\n'
        f'[corpus]\n"{trained}/text.jsonl" = 1.0\n[interpretability]\n'
        f"dictionaries = {json.dumps(folders)}\nfeatures = 6\nfragments = 500\nfragment_tokens = 8\n"
        "stride = 9\nexamples = 8\n"
    )
    (tmp_path / "paper.toml").write_text(text)

    main(["interpretability", str(tmp_path / "paper.toml")])
    results = tmp_path / "out" / "interpretability"
    times = {path: path.stat().st_mtime_ns for path in results.rglob("*.json*")}
    main(["interpretability", str(tmp_path / "paper.toml")])

    page = Path(capsys.readouterr().out.splitlines()[-1]).read_text()
    for title in (
        "Features against baselines",
        "Sparsity alone",
        "The control with random weights",
    ):
        assert title in page
    assert page.count("<svg") == 3
    assert {path: path.stat().st_mtime_ns for path in results.rglob("*.json*")} == times
    assert not list(results.glob("activations-*"))
    found = json.loads((results / "out" / "tied" / "token.json").read_text())["result"]
    assert found["eligible"] >= len(found["features"]) == 6
    for row in found["features"]:
        assert row["moments"]["kurtosis"] >= row["moments"]["skewness"] ** 2 + 1 - 1e-3
        assert row["scores"].keys() == {
            "top_and_random",
            "top",
            "random",
            "top_and_fresh",
            "top_and_any",
        }
        exported = results / "neuron-explainer" / "out" / "tied"
        neuron = json.loads((exported / "neurons" / "1" / f"{row['feature']}.json").read_text())
        assert len(neuron["most_positive_activation_records"]) == len(neuron["random_sample"]) == 8
        lines = (exported / "token" / "1" / f"{row['feature']}.jsonl").read_text().splitlines()
        (explained,) = json.loads(lines[0])["scored_explanations"]
        scored = explained["scored_simulation"]
        assert scored["ev_correlation_score"] == row["scores"]["top_and_random"]
        assert len(scored["scored_sequence_simulations"]) == 4


def test_a_broken_off_run_goes_on_where_it_was(trained: Path, tmp_path: Path) -> None:
    stop = Stop()
    lab = Lab(paper_config(trained, tmp_path, "tied", "top_k", explainers=("token",)), stop)
    measurement = Measurement(lab)
    scored = measurement._score

    def stopping(*arguments: object) -> object:
        found = scored(*arguments)  # type: ignore[arg-type]
        stop.requested = True
        return found

    measurement._score = stopping  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        measurement.run()
    first = tmp_path / "interpretability" / "out" / "tied" / "token.json"
    written = first.stat().st_mtime_ns
    stop.requested = False
    found = Measurement(lab).run()

    assert first.stat().st_mtime_ns == written
    assert len(found["out/top_k", "token"]["features"]) == 6


def test_a_single_feature_makes_no_mean(trained: Path, tmp_path: Path) -> None:
    config = paper_config(trained, tmp_path, "tied", "random-k0", features=1)

    section = experiment(Lab(config, Stop()))

    first, second = section.findings
    assert first.verdict == second.verdict == Verdict.DIFFERS
    assert "out/tied" not in first.because
    assert first.tables[0].rows[0][5:] == ["-"] * 6
    assert not first.figures


def test_too_little_text_and_wrong_settings_are_named(trained: Path, tmp_path: Path) -> None:
    few = Lab(paper_config(trained, tmp_path, "tied", fragments=9), Stop())

    with pytest.raises(BadCorpus, match="no feature of out/tied is active in 10 of"):
        Measurement(few).run()
    with pytest.raises(BadConfig, match="dictionaries is empty"):
        Measurement(Lab(paper_config(trained, tmp_path), Stop()))
    for changes, message in (
        ({"explainers": ("gpt",)}, r"\['gpt'\]; allowed are token"),
        ({"explainers": ("llm",)}, "`llm` must name a model"),
        ({"examples": 6}, "multiple of 4"),
        ({"features": 0}, "above 0"),
        ({"fragment_tokens": 1}, "above 1"),
        ({"simulator": "m"}, "go together"),
    ):
        with pytest.raises(BadConfig, match=message):
            InterpretabilitySettings(**changes)  # type: ignore[arg-type]


def test_without_the_package_openai_a_language_model_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)

    with pytest.raises(BadConfig, match=r"steer\[explain\]"):
        Endpoint("http://127.0.0.1:1/v1", "model")


def m(value: float) -> Mean:
    return Mean(value, 0.1, 50)


def test_verdicts_follow_their_rules() -> None:
    yes, no, partly = Verdict.REPRODUCED, Verdict.NOT_REPRODUCED, Verdict.DIFFERS

    assert verdicts.above([m(0.7), m(0.6)], [m(0.3), m(0.39)]) == yes
    assert verdicts.above([m(0.7), m(0.5)], [m(0.3), m(0.39)]) == partly
    assert verdicts.above([m(0.5)], [m(0.39)]) == no
    assert verdicts.above([m(0.5)], []) == partly
    pairs = [(m(0.7), m(0.4))]
    assert verdicts.lower_in_the_same_order(pairs, [m(0.4)], [m(0.39)]) == yes
    assert verdicts.lower_in_the_same_order(pairs, [m(0.4)], [m(0.41)]) == partly
    assert verdicts.lower_in_the_same_order(pairs, [m(0.4)], []) == partly
    assert verdicts.lower_in_the_same_order([(m(0.3), m(0.4))], [m(0.4)], [m(0.41)]) == no
    assert verdicts.no_better(m(0.4), m(0.3)) == yes
    assert verdicts.no_better(m(0.6), m(0.3)) == no
    assert verdicts.share_of_gain(m(0.2), m(0.3), m(0.6)) == pytest.approx(0.25)
    assert verdicts.share_of_gain(m(0.2), m(0.3), m(0.1)) is None
    assert verdicts.small_parts({"pca": 0.5, "ica": -0.1}) == yes
    assert verdicts.small_parts({"pca": 0.5, "ica": None}) == partly
    assert verdicts.small_parts({"pca": 0.51}) == no
    assert verdicts.small_parts({}) == partly
