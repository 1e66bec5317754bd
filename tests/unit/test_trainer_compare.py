"""Likeness of dictionaries against its definition, and the report."""

import json
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest
import torch

from steer_server.dictionary.files import load
from tests.unit.trainer_model import tiny_config, write_model
from trainer.cli import main
from trainer.compare import likeness
from trainer.run import label, run
from trainer.stop import Stop


def test_a_dictionary_in_another_order_is_the_same() -> None:
    rows = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))

    assert likeness(rows, 3 * rows[torch.randperm(12)]) == pytest.approx((1.0, 1.0, 1.0))


def test_likeness_is_by_definition() -> None:
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(4, 3, generator=generator), torch.randn(5, 3, generator=generator)
    b[0] = a[2]
    cosines = torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=2)

    mmcs, matched, shared = likeness(a, b)

    best = max(permutations(range(5), 4), key=lambda p: sum(cosines[i, j] for i, j in enumerate(p)))
    pairs = torch.tensor([cosines[i, j] for i, j in enumerate(best)])
    assert mmcs == pytest.approx(cosines.max(dim=1).values.mean().item())
    assert matched == pytest.approx(pairs.mean().item())
    assert shared == pytest.approx((pairs > 0.9).double().mean().item())
    assert likeness(b, a).mmcs != pytest.approx(mmcs)


def test_the_command_prints_and_writes_a_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(write_model(tmp_path / "model"), tmp_path)
    configs = [replace(config, seed=seed, out=str(tmp_path / f"seed{seed}")) for seed in (0, 1)]
    run(configs, tmp_path / "runs", Stop())
    score = {"f1": 0.5, "auroc": 0.75, "accuracy": 0.625}
    row = {"dictionary": "<d>", "site": "resid_post.1", "k": 5, "score": score}
    (tmp_path / "probe.json").write_text(json.dumps({"probes": [row, row]}))
    more = ["--out", str(tmp_path / "report"), "--probe", str(tmp_path / "probe.json")]

    assert main(["compare", *(c.out for c in configs), *more]) == 0

    shown = capsys.readouterr().out
    quality, alike = shown.split("\n\n")[:2]
    assert quality.count("tied_relu") == 2
    assert alike.count(str(tmp_path / "seed0")) == 2
    written = (tmp_path / "report" / "report.md").read_text()
    assert written.startswith(quality)
    assert (tmp_path / "report" / "quality.svg").read_text().count("<svg") == 1
    assert "| <d> | resid_post.1 | 5 | 2 | 0.500 | 0.750 | 0.625 |" in written
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("<table>") == 3
    assert page.count("<svg") == 1
    assert "<td>&lt;d&gt;</td>" in page
    curve = [json.loads(line) for line in load(Path(configs[0].out)).curve.splitlines()]
    assert [line["step"] for line in curve] == [50, 100, 124]
    assert set(curve[0]) == {"step", "loss", "l0", "fvu", "dead_share"}


def test_a_label_leaves_the_training_curve_where_it_is(tmp_path: Path) -> None:
    config = tiny_config(write_model(tmp_path / "model"), tmp_path)
    (card,) = run([config], tmp_path / "runs", Stop())
    before = load(Path(config.out)).curve
    labels = tmp_path / "labels.toml"
    labels.write_text(f'weights_sha256 = "{card.sha256}"\n[labels]\n3 = "cats"\n')

    label(Path(config.out), labels)

    assert before
    assert load(Path(config.out)).curve == before


def test_a_file_that_is_not_of_probes_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(write_model(tmp_path / "model"), tmp_path)
    run([config], tmp_path / "runs", Stop())
    (tmp_path / "p.json").write_text("{}")

    assert main(["compare", config.out, "--probe", str(tmp_path / "p.json")]) == 1
    assert "p.json cannot be read (KeyError('probes'))" in capsys.readouterr().err
