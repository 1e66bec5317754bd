"""Configuration, results and page of the paper's experiments."""

import json
from pathlib import Path

import pytest

from trainer.compare import Table
from trainer.errors import BadConfig
from trainer.paper.config import load
from trainer.paper.page import Finding, Section, Verdict, plot, write_page
from trainer.paper.results import Results

CONFIG = 'model = "m"\nout = "o"\ncorpus = {"c" = 1.0}\n[ioi]\nprompts = 4\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (CONFIG + "promts = 3\n", r"unknown keys: ioi\.promts; known are dictionaries"),
        ("wrong = 3\n" + CONFIG, "unknown keys: wrong; known are model"),
        ('model = "m"\nout = "o"\n', "missing 1 required keyword-only argument: 'corpus'"),
        (CONFIG.replace("4", '"4"'), "prompts is '4'; it must be int"),
        (CONFIG + "sizes = [1, 2.5]\n", "must list int"),
        (CONFIG.replace("4", "0"), r"ioi\.prompts is 0, it must be above 0"),
        (CONFIG + "sizes = [0, 4, 2]\n", r"ioi\.sizes is \[0, 4, 2\]; it must rise from 0"),
        (CONFIG + "thresholds = [1.0, 0.5]\n", r"ioi\.thresholds is .* must rise"),
        (CONFIG + "[cases]\ndictionary = 3\n", "dictionary is 3; it must be str"),
    ],
)
def test_a_wrong_key_or_value_is_named(tmp_path: Path, text: str, message: str):
    (tmp_path / "paper.toml").write_text(text)

    with pytest.raises(BadConfig, match=message):
        load(tmp_path / "paper.toml")


def test_a_table_s_key_is_replaced_from_the_command_line(tmp_path: Path):
    (tmp_path / "paper.toml").write_text(CONFIG)

    config = load(tmp_path / "paper.toml", ["ioi.prompts=7", "seed=3", "cases.dictionary=a/b"])

    assert (config.ioi.prompts, config.seed, config.cases.dictionary) == (7, 3, "a/b")


def test_a_result_is_computed_once_for_its_settings(tmp_path: Path):
    results, calls = Results(tmp_path), []

    def compute():
        calls.append(1)
        return {"value": (1, 2)}

    first = results.get("part", {"n": (1,)}, compute)
    again = results.get("part", {"n": (1,)}, compute)
    other = results.get("part", {"n": (2,)}, compute)

    assert first == again == other == {"value": [1, 2]}
    assert len(calls) == 2
    assert json.loads((tmp_path / "part.json").read_text())["settings"] == {"n": [2]}


def test_a_result_that_fails_leaves_the_one_before(tmp_path: Path):
    results = Results(tmp_path)
    results.get("part", {}, lambda: 1)

    with pytest.raises(ZeroDivisionError):
        results.get("part", {"n": 1}, lambda: 1 / 0)

    assert results.get("part", {}, lambda: 2) == 1


def test_a_file_that_is_no_result_is_named(tmp_path: Path):
    (tmp_path / "part.json").write_text("{}")

    with pytest.raises(BadConfig, match=r"part\.json is not a file of results"):
        Results(tmp_path).get("part", {}, lambda: 1)


def test_the_page_shows_each_claim_beside_its_verdict(tmp_path: Path):
    figure = plot(lambda canvas: canvas.subplots().plot([1, 2]), "a <line>")
    finding = Finding(
        "T", "claim & all", Verdict.NOT_REPRODUCED, "so", [Table(["a"], [["b"]])], [figure]
    )

    write_page("Title", "about", [Section("S", "what", [finding])], tmp_path / "report.html")

    page = (tmp_path / "report.html").read_text()
    assert '<span class="verdict not-reproduced">not reproduced</span>' in page
    assert "claim &amp; all" in page
    assert "a &lt;line&gt;" in page
    assert page.count("<svg") == 1
    assert "<td>S</td><td>T</td><td>not reproduced</td>" in page
    text = (tmp_path / "report.md").read_text()
    assert "### T: not reproduced\n\n**The paper:** claim & all\n\n**Here:** so\n\n| a |" in text
