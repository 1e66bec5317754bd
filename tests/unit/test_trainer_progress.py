"""Whoever watches a training is told the same numbers, once each."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from steer_server.dictionary.site import Site
from tests.unit.trainer_model import tiny_config, write_model
from trainer.checkpoint import CHECKPOINT
from trainer.cli import main
from trainer.config import TrainConfig
from trainer.errors import BadConfig, Interrupted
from trainer.harvest import Activations, harvest
from trainer.progress import EVERY, Progress, Watchers, curves
from trainer.step import Outcome
from trainer.stop import Stop
from trainer.train import METRICS, train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def configs(model_folder: Path, tmp_path: Path) -> list[TrainConfig]:
    """Of two shapes, the second of which is trained as a stack of two."""
    config = tiny_config(model_folder, tmp_path)
    sizes = {"one": (16, 0.01), "two": (24, 0.01), "three": (24, 0.02)}
    return [
        replace(config, n_features=n, alpha=alpha, out=f"d/{name}")
        for name, (n, alpha) in sizes.items()
    ]


@pytest.fixture
def activations(configs: list[TrainConfig], tmp_path: Path) -> Activations:
    (found,) = harvest(
        configs[0], [Site.parse(configs[0].site)], tmp_path / "harvest", Stop()
    ).values()
    return found


def outcome(*loss: float) -> tuple[Outcome, torch.Tensor]:
    values = torch.tensor(loss)
    nothing = torch.zeros(len(loss), 1)
    return Outcome(values, 10 * values, values / 2, nothing > 0, nothing), values / 4


def test_the_bar_shows_tokens_per_second_what_is_left_and_each_ranges_ends(
    configs: list[TrainConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress(configs, tmp_path / METRICS, 3, 4, Watchers()) as progress:
        first, dead = outcome(0.5)
        others, dead_too = outcome(1.0, 2.0)
        progress.update(4, [first, others], [dead, dead_too])

    shown = capsys.readouterr().err
    assert re.search(r"train: 100%.* 256/256 \[.*<.*tokens/s, loss=0\.5\.\.2, L0=5\.\.20, ", shown)
    assert "FVU=0.25..1, dead=0.125..0.5]" in shown


def test_the_textfile_says_what_the_lines_say(
    configs: list[TrainConfig], activations: Activations, tmp_path: Path
) -> None:
    path = tmp_path / "steer.prom"

    train(configs, activations, tmp_path / "training", Stop(), watchers=Watchers(textfile=path))

    lines = (tmp_path / "training" / METRICS).read_text().splitlines()[-3:]
    text = path.read_text()
    for line in map(json.loads, lines):
        for name in ("loss", "l0", "fvu", "dead_share"):
            (value,) = re.findall(
                rf'^steer_training_{name}{{dictionary="{line["out"]}"}} (.+)$', text, re.M
            )
            assert float(value) == line[name]
    step = json.loads(lines[-1])["step"]
    assert f"steer_training_step {float(step)}\n" in text
    assert f"steer_training_steps {float(step)}\n" in text
    assert float(re.findall(r"^steer_training_tokens_per_second (.+)$", text, re.M)[0]) > 0
    assert [file.name for file in tmp_path.glob("steer.prom*")] == ["steer.prom"]


def test_tensorboard_has_a_run_of_each_dictionary_and_no_step_twice(
    configs: list[TrainConfig], activations: Activations, tmp_path: Path
) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    watchers = Watchers(tensorboard=tmp_path / "events")
    stop = Stop()

    def interrupt(step: int) -> None:
        stop.requested = step == EVERY + 3

    with pytest.raises(Interrupted):
        train(configs, activations, tmp_path / "training", stop, interrupt, watchers)
    (tmp_path / "training" / CHECKPOINT).unlink()
    train(configs, activations, tmp_path / "training", Stop(), watchers=watchers)

    lines = [json.loads(x) for x in (tmp_path / "training" / METRICS).read_text().splitlines()]
    for config in configs:
        events = accumulator.EventAccumulator(str(tmp_path / "events" / config.out)).Reload()
        got = events.Scalars("fvu")
        own = [line for line in lines if line["out"] == config.out]
        assert [event.step for event in got] == [line["step"] for line in own]
        assert [event.value for event in got] == pytest.approx([line["fvu"] for line in own])


def test_a_dictionarys_curve_is_its_own_and_short(
    configs: list[TrainConfig], activations: Activations, tmp_path: Path
) -> None:
    train(configs, activations, tmp_path / "training", Stop())
    lines = [json.loads(x) for x in (tmp_path / "training" / METRICS).read_text().splitlines()]
    path = tmp_path / "long.jsonl"
    path.write_text("".join(f'{{"step": {step}, "out": "a"}}\n' for step in range(1203)))

    own = curves(tmp_path / "training" / METRICS, 3)
    (long,) = curves(path, 1)

    for config, curve in zip(configs, own, strict=True):
        mine = [{k: v for k, v in x.items() if k != "out"} for x in lines if x["out"] == config.out]
        assert [json.loads(line) for line in curve.splitlines()] == mine
    steps = [json.loads(line)["step"] for line in long.splitlines()]
    assert len(steps) <= 501
    assert (steps[0], steps[-1]) == (0, 1202)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--textfile", "steer.txt"], "node_exporter reads files named *.prom"),
        (["--textfile", "nowhere/steer.prom"], "in a folder that is there"),
    ],
)
def test_a_textfile_that_nobody_reads_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    (tmp_path / "c.toml").write_text(
        'model = "m"\nsite = "resid_post.1"\nout = "o"\ntokens = 9\nn_features = 9\nk = 1\n'
        '[corpus]\n"a.txt" = 1\n'
    )

    assert main(["train", str(tmp_path / "c.toml"), *flags]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("package", ["tensorboard", "prometheus_client"])
def test_a_package_that_is_not_there_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, package: str
) -> None:
    for name in (package, "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    kind = "tensorboard" if package == "tensorboard" else "textfile"

    with pytest.raises(
        BadConfig, match=rf"--{kind} needs the package .* pip install {package[:6]}"
    ):
        Watchers(**{kind: tmp_path / "x.prom"}).check()
