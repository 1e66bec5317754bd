"""What goes wrong on real machines: killed processes, full disks, damaged files, too little memory, typing errors."""

import json
import os
import random
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from steer_server.dictionary.site import Site
from tests.unit.trainer_model import tiny_config, write_model
from trainer.checkpoint import CHECKPOINT
from trainer.cli import main
from trainer.config import TrainConfig
from trainer.errors import BadCheckpoint, BadConfig
from trainer.harvest import harvest
from trainer.stack import Stack
from trainer.stop import Stop


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return tiny_config(write_model(tmp_path / "model"), tmp_path)


def write_toml(config: TrainConfig, epochs: int) -> Path:
    """Of a small BatchTopK dictionary."""
    path = Path(config.out).parent.with_name("c.toml")
    lines = [f"{key} = {json.dumps(getattr(config, key))}" for key in ("model", "site", "out")]
    lines += ["tokens = 4096", "eval_tokens = 256", "n_features = 24", "k = 4", "batch = 64"]
    lines += [f"epochs = {epochs}", "context = 32", "threads = 1", "holdout_every = 10"]
    lines += ["[corpus]", f"{json.dumps(next(iter(config.corpus)))} = 1.0"]
    path.write_text("\n".join(lines))
    return path


def command(toml: Path, runs: Path, out: Path) -> list[str]:
    train = [sys.executable, "-m", "trainer", "train", str(toml), "--runs", str(runs)]
    return [*train, "--set", f"out={out}"]


@pytest.mark.nightly
@pytest.mark.timeout(1200)
def test_ten_kills_at_random_moments_change_no_byte(config: TrainConfig, tmp_path: Path) -> None:
    toml = write_toml(config, epochs=40)
    unbroken = subprocess.run(command(toml, tmp_path / "a", tmp_path / "one"), check=True)
    generator = random.Random(0)

    for _ in range(10):
        process = subprocess.Popen(command(toml, tmp_path / "b", tmp_path / "two"))
        time.sleep(generator.uniform(1, 14))
        process.kill()
        process.wait()
    resumed = subprocess.run(command(toml, tmp_path / "b", tmp_path / "two"), check=True)

    assert unbroken.returncode == resumed.returncode == 0
    weights = [(tmp_path / name / "weights.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1]


def test_a_full_disk_is_said_and_the_checkpoint_before_it_stays(
    config: TrainConfig, tmp_path: Path
) -> None:
    toml = write_toml(config, epochs=8)

    def limit() -> None:
        # Enough for the harvest, not for a checkpoint.
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    big = ["--set", "n_features=2048", "--set", "k=4"]
    full = subprocess.run(
        [*command(toml, tmp_path / "runs", tmp_path / "one"), *big],
        preexec_fn=limit,
        capture_output=True,
        text=True,
        check=False,
    )

    assert full.returncode == 1, full.stderr
    assert "could not be written" in full.stderr
    assert "the same command goes on" in full.stderr
    assert "Traceback" not in full.stderr
    assert not list((tmp_path / "runs").glob("**/.*.part"))
    assert not list((tmp_path / "runs").glob(f"training-*/{CHECKPOINT}"))
    subprocess.run([*command(toml, tmp_path / "runs", tmp_path / "one"), *big], check=True)
    assert (tmp_path / "one" / "dictionary.json").exists()


def test_a_damaged_shard_is_named(config: TrainConfig, tmp_path: Path) -> None:
    sites = [Site.parse(config.site)]
    harvest(config, sites, tmp_path / "activations", Stop())
    shard = next((tmp_path / "activations").glob("*/shard-*"))
    os.truncate(shard, shard.stat().st_size // 2)

    with pytest.raises(BadCheckpoint, match=f"{shard} is damaged"):
        harvest(config, sites, tmp_path / "activations", Stop())


def test_a_width_that_does_not_fit_is_refused_before_anything_is_allocated(
    config: TrainConfig,
) -> None:
    wide = replace(config, architecture="top_k", alpha=0.0, k=8, n_features=2**36)

    with pytest.raises(BadConfig, match=r"features need [\d.]+ GiB to train, [\d.]+ GiB are free"):
        Stack([wide], torch.zeros(16), 100)


def test_what_a_step_makes_anew_counts_twice_on_a_cpu(config: TrainConfig) -> None:
    """Two tables of 2^20 tokens by 2^16 features, 4 bytes each."""
    large = replace(
        config, architecture="top_k", alpha=0.0, k=8, n_features=2**16, batch=2**20, tokens=2**21
    )

    with pytest.raises(BadConfig, match=r"features need 1024\.0 GiB to train"):
        Stack([large], torch.zeros(16), 100)


def test_a_typing_error_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.toml").write_text('model = "m"\narchitectur = "top_k"\n')

    assert main(["train", str(tmp_path / "c.toml")]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: unknown keys: architectur; known are")
    assert shown.count("\n") == 1
