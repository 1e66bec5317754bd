"""Probes are fitted on training documents, measured on held-out ones, and say the same each time."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.trainer_model import tiny_config, write_model
from trainer.cli import main
from trainer.config import TrainConfig
from trainer.probe import Probe
from trainer.run import probe_again, run
from trainer.stop import Stop

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = (4096, 512)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    folder = tmp_path_factory.mktemp("probe")
    tiny = tiny_config(write_model(folder / "model"), folder)
    return replace(tiny, alpha=0.0, n_features=16)


@pytest.fixture(scope="module")
def folders(config: TrainConfig) -> list[Path]:
    """The basis, and the differences of means of the six classes that are frequent."""
    configs = [
        replace(config, architecture="basis", out=f"{config.out}/basis"),
        replace(config, architecture="diff_mean", n_features=6, out=f"{config.out}/diff_mean"),
    ]
    run(configs, Path(config.out).parent / "runs", Stop())
    return [Path(c.out) for c in configs]


def rows_of(rows: list[Probe], name: Path | str, k: int = 0) -> dict[str, Probe]:
    return {row.tag: row for row in rows if row.dictionary == str(name) and row.k == k}


def test_probes_of_the_basis_are_those_of_the_coordinates_and_each_run_says_the_same(
    folders: list[Path],
) -> None:
    rows, _ = probe_again(folders, [], TOKENS, [], [1, 5], Stop())
    again, _ = probe_again(folders, [], TOKENS, [], [1, 5], Stop())

    assert rows == again
    for k in (1, 5):
        basis, plain = rows_of(rows, folders[0], k), rows_of(rows, "coordinates", k)
        assert set(basis) >= {"AT", "NN", "JJ", "VB", "IN"}
        for tag, row in basis.items():
            assert row.features == plain[tag].features
            assert row.score == pytest.approx(plain[tag].score, abs=1e-6)
            assert len(row.features) == k


def test_the_feature_of_a_class_is_chosen_for_it_and_tells_it(folders: list[Path]) -> None:
    rows, _ = probe_again(folders, [], TOKENS, ["NN", "JJ"], [1], Stop())

    found = rows_of(rows, folders[1], 1)
    assert found["JJ"].features == (0,)
    assert found["NN"].features == (1,)
    every, single = rows_of(rows, "all coordinates"), rows_of(rows, "coordinates", 1)
    for tag, row in found.items():
        difference = rows_of(rows, "difference of means")[tag].score
        assert row.score.auroc == pytest.approx(difference.auroc, abs=0.1)
        assert single[tag].score.auroc < row.score.auroc < every[tag].score.auroc
        assert every[tag].score.auroc > 0.65
        assert 0.1 < row.test_share < 0.4


def test_probes_are_measured_on_held_out_documents(
    config: TrainConfig, folders: list[Path], tmp_path: Path
) -> None:
    """Where those call adjectives nouns and nouns adjectives, nouns are told no better than by chance."""
    lines = Path(next(iter(config.corpus))).read_text().splitlines()
    swap = {"nn": "jj", "jj": "nn"}
    with (tmp_path / "swapped.jsonl").open("w") as file:
        for number, line in enumerate(lines):
            record = json.loads(line)
            if number % config.holdout_every == config.holdout_every - 1:
                record["tags"] = [swap.get(tag, tag) for tag in record["tags"]]
            file.write(json.dumps(record) + "\n")

    corpora = [str(tmp_path / "swapped.jsonl")]
    rows, _ = probe_again(folders[:1], corpora, TOKENS, ["NN", "AT"], [1], Stop())

    found = rows_of(rows, "all coordinates")
    assert found["NN"].score.auroc < 0.55
    assert found["AT"].score.auroc > 0.7


def test_the_command_prints_a_table_and_writes_every_figure(
    folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--train-tokens", "4096", "--test-tokens", "512"]
    command = ["probe", str(folders[1]), "--tags", "NN", "--k", "2,1", *sizes]

    assert main([*command, "--json", str(tmp_path / "probe.json")]) == 0

    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("| tag | dictionary | site | k | F1 |")
    assert len(shown) == 2 + 2 * 6
    content = json.loads((tmp_path / "probe.json").read_text())
    assert [row["k"] for row in content["probes"]] == [0, 0, 1, 2, 1, 2]
    assert content["train_tokens"] == 4096
    last = content["probes"][-1]["score"]
    assert f"| NN | {folders[1]} | resid_post.1 | 2 | {last['f1']:.3f} |" in shown[-1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tags", "NN,XX"], "no XX with 200 training and 50 test tokens; there are JJ, NN"),
        (["--k", "99"], "k is 99, but a dictionary has 16 features"),
    ],
)
def test_what_cannot_be_probed_is_said(
    folders: list[Path], capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    sizes = ["--train-tokens", "4096", "--test-tokens", "512"]

    assert main(["probe", str(folders[0]), *sizes, *flags]) == 1
    assert message in capsys.readouterr().err
