"""Several processes train what one does, stop together and go on; under torchrun they outlive signals and kills."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.unit import rank_runs
from tests.unit.rank_runs import MODES, kept
from tests.unit.trainer_model import tiny_config, write_model
from trainer import harvest
from trainer.architectures import ARCHITECTURES
from trainer.checkpoint import CHECKPOINT, PARTS
from trainer.config import TrainConfig
from trainer.errors import BadCheckpoint, BadConfig
from trainer.launch import check
from trainer.ranks import ALONE
from trainer.run import run
from trainer.stop import Stop
from trainer.top_k import TopK
from trainer.train import train

pytestmark = pytest.mark.usefixtures("one_thread")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    folder = tmp_path_factory.mktemp("ranks")
    return tiny_config(write_model(folder / "model"), folder)


@pytest.fixture(scope="module")
def found(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that two ranks filled with `rank_runs`."""
    folder = tmp_path_factory.mktemp("found")
    rank_runs.write_config(config, folder)
    subprocess.run(
        [sys.executable, "-m", "tests.unit.rank_runs", str(folder)],
        check=True,
        env=ENVIRONMENT,
        timeout=300,
    )
    return folder


@pytest.mark.parametrize("name", list(ARCHITECTURES))
@pytest.mark.parametrize("mode", MODES)
def test_two_ranks_train_what_one_does(
    config: TrainConfig, found: Path, tmp_path: Path, mode: str, name: str
) -> None:
    """Loss, L0, FVU and dead share of every step, and all parameters; AuxK and clipping are at work."""
    alone = rank_runs.steps(config, name, tmp_path, ALONE)
    together = load_file(found / f"{mode}-{name}.safetensors")

    assert set(together) == set(alone)
    for key, value in alone.items():
        torch.testing.assert_close(
            together[key], value, rtol=1e-3, atol=1e-4, msg=lambda m, k=key: f"{k}: {m}"
        )
    assert (alone["said"][:, 3] > 0).any() or not isinstance(ARCHITECTURES[name], TopK)


@pytest.mark.parametrize("mode", MODES)
def test_ranks_stop_at_the_same_step_and_go_on_to_the_same_bytes(found: Path, mode: str) -> None:
    """One rank alone had the signal; every architecture was in the pass."""
    for rank in range(2):
        said = load_file(found / f"{mode}-broken-{rank}.safetensors")

        assert set(said) == {"stopped", "bytes", "parts", "weights"}
        assert all(said.values()), said


def test_ranks_that_resample_hold_the_same_dictionaries(found: Path) -> None:
    tensors = load_file(found / "resampled.safetensors")

    for name, (first, second) in tensors.items():
        assert torch.equal(first, second), name
    # Half of the features were dead, and could not have come back alone.
    assert (tensors["p.b_enc"] > -100).all()


def test_the_nth_largest_and_the_best_of_all_ranks_are_exact(found: Path) -> None:
    said = load_file(found / "selection.safetensors")

    z = said["z"]
    expected = torch.stack(
        [own.flatten().topk(n).values[-1] for own, n in zip(z, (60, 7), strict=True)]
    )
    for guess in (-99.0, 20.0, 38.0):
        assert torch.equal(said[f"nth {guess}"], expected), guess
    assert (said["chosen"] == 4).all()
    assert torch.equal(said["lowest"], z.topk(4, dim=2).values[..., -1])


def test_members_divided_among_ranks_are_to_the_bit_those_of_one_process(
    config: TrainConfig, found: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harvest, "SHARD_CONTEXTS", 16)
    run(rank_runs.members_of(config, tmp_path / "members"), tmp_path / "runs", Stop())

    for path in sorted((tmp_path / "members").glob("*/weights.safetensors")):
        other = found / "members" / path.parent.name / path.name
        assert path.read_bytes() == other.read_bytes(), path
    shards = sorted((tmp_path / "runs").glob("activations-*/*/shard-*"))
    assert len(shards) > 4
    for path in shards:
        assert path.read_bytes() == (found / path.relative_to(tmp_path)).read_bytes(), path


@pytest.mark.parametrize("mode", MODES)
def test_a_checkpoint_of_other_ranks_is_named_and_kept(
    config: TrainConfig, found: Path, mode: str
) -> None:
    folder = found / mode / "unbroken"
    before = kept(folder)

    with pytest.raises(BadCheckpoint, match="is of 2 processes, these are 1"):
        train(rank_runs.everything(config), rank_runs.activations(config), folder, Stop())
    assert kept(folder) == before


@pytest.mark.parametrize(
    ("change", "size", "message"),
    [
        ({"batch": 63}, 2, "batch is 63; with parallel = 'data' it must be a multiple of .* 2"),
        ({"parallel": "features", "n_features": 25}, 2, "n_features is 25; .* multiple of .* 2"),
        ({"parallel": "members"}, 2, "2 processes cannot divide 1 dictionaries"),
        (
            {"parallel": "features", "architecture": "matryoshka", "k": 2, "prefixes": (0.05,)},
            2,
            "must add one on each of 2 processes",
        ),
        ({"parallel": "features", "resample_every": 5}, 2, "resample_every is 5; .* must be 0"),
    ],
)
def test_what_ranks_cannot_divide_is_refused(
    config: TrainConfig, change: dict, size: int, message: str
) -> None:
    with pytest.raises(BadConfig, match=message):
        check([replace(config, **change)], size)


def command(config: TrainConfig, folder: Path, out: Path, mode: str, runs: Path) -> list[str]:
    """Trains a BatchTopK dictionary on two ranks."""
    path = folder / "c.toml"
    lines = [f"{key} = {json.dumps(getattr(config, key))}" for key in ("model", "site")]
    lines += ["tokens = 4096", "eval_tokens = 256", "n_features = 24", "k = 4", "batch = 64"]
    lines += ["epochs = 15", "context = 32", "threads = 1", "holdout_every = 10"]
    lines += [f"parallel = {mode!r}", f"out = {str(out)!r}", "[corpus]"]
    lines += [f"{json.dumps(next(iter(config.corpus)))} = 1.0"]
    path.write_text("\n".join(lines))
    return [*TORCHRUN, "-m", "trainer", "train", str(path), "--runs", str(runs)]


def wait_for_steps(runs: Path, steps: int) -> None:
    """Until so many lines of metrics, one for every 50 steps, are more than there were."""
    end = time.monotonic() + 300
    while time.monotonic() < end:
        if sum(len(path.read_text().splitlines()) for path in runs.glob("*/metrics.jsonl")) > steps:
            return
        time.sleep(0.1)
    pytest.fail("no progress")


def rank_of(launcher: subprocess.Popen[bytes], rank: int) -> psutil.Process:
    workers = psutil.Process(launcher.pid).children()
    return next(worker for worker in workers if worker.environ().get("RANK") == str(rank))


@pytest.mark.nightly
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("mode", MODES)
def test_a_terminated_launcher_and_a_killed_rank_change_no_byte(
    config: TrainConfig, tmp_path: Path, mode: str
) -> None:
    whole = command(config, tmp_path, tmp_path / "one", mode, tmp_path / "a")
    subprocess.run(whole, check=True, env=ENVIRONMENT)
    broken = command(config, tmp_path, tmp_path / "two", mode, tmp_path / "b")

    told = tmp_path / "told"

    def start() -> subprocess.Popen[bytes]:
        # A pipe that nobody reads would fill with progress bars.
        with told.open("w") as file:
            return subprocess.Popen(broken, stderr=file, env=ENVIRONMENT)

    with start() as launcher:
        wait_for_steps(tmp_path / "b", 1)
        launcher.send_signal(signal.SIGTERM)
        launcher.wait(timeout=60)
    assert launcher.returncode != 0
    assert told.read_text().count("The same command goes on from there.") == 1
    assert "/trainer/" not in told.read_text()
    (folder,) = (tmp_path / "b").glob("training-*")
    assert (folder / (CHECKPOINT if mode == "data" else PARTS)).exists()

    with start() as launcher:
        wait_for_steps(tmp_path / "b", 8)
        killed = time.monotonic()
        rank_of(launcher, 1).kill()
        launcher.wait(timeout=60)
    assert launcher.returncode != 0
    assert time.monotonic() - killed < 30
    assert "process 0: error: another process of this training ended" in told.read_text()
    assert "/trainer/" not in told.read_text()

    subprocess.run(broken, check=True, env=ENVIRONMENT)
    weights = [(tmp_path / name / "weights.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1]
