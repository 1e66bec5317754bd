"""The benchmark of the trainer runs, with ours alone: the other libraries are not installed here."""

import json
import subprocess
import sys
from pathlib import Path

import torch

from tests.unit.trainer_model import tiny_config, write_model

ROOT = Path(__file__).parents[2]


def test_the_throughput_of_our_trainer_is_measured(tmp_path: Path) -> None:
    activations = tmp_path / "x.f32"
    activations.write_bytes(torch.randn(512, 576).numpy().tobytes())
    options = {
        "--only": "top_k",
        "--libraries": "steer",
        "--n-features": "64",
        "--batch": "128",
        "--threads": "1",
        "--activations": activations,
        "--json": tmp_path / "result.json",
    }
    script = ROOT / "benchmarks" / "trainer_throughput.py"
    arguments = [str(part) for pair in options.items() for part in pair]
    subprocess.run([sys.executable, script, "--quick", *arguments], cwd=ROOT, check=True)

    (case,) = json.loads((tmp_path / "result.json").read_text())["cases"].values()
    (ours,) = case["contestants"].values()
    assert ours["ratio"]["median"] == 1
    assert ours["dictionary_tokens_per_second"] > 0
    assert ours["cpu_ms"] > 0


def test_the_parts_of_a_step_are_told_beside_its_floor(tmp_path: Path) -> None:
    activations = tmp_path / "x.f32"
    activations.write_bytes(torch.randn(300, 576).numpy().tobytes())
    options = {
        "--only": "top_k",
        "--batch": "128",
        "--threads": "1",
        "--activations": activations,
        "--json": tmp_path / "result.json",
    }
    script = ROOT / "benchmarks" / "trainer_profile.py"
    arguments = [str(part) for pair in options.items() for part in pair]
    subprocess.run([sys.executable, script, "--quick", *arguments], cwd=ROOT, check=True)

    (case,) = json.loads((tmp_path / "result.json").read_text())["cases"].values()
    assert case["l0"] == [32]
    assert case["dense_members"] == 0
    assert 0 < case["floor_ms"] < case["ms"]
    assert all(ms > 0 for ms in case["parts_ms"].values())
    # Five products of full width, over one and what 32 active features take.
    assert 4.5 < case["ideal_ratio"] < 5


def test_ours_is_measured_from_tokens_to_a_dictionary(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    text = tiny_config(model, tmp_path).corpus
    for name in ("brown.jsonl", "sotu.jsonl"):
        (tmp_path / name).symlink_to(next(iter(text)))
    options = {
        "--model": model,
        "--corpora": tmp_path,
        "--libraries": "steer",
        "--rounds": 1,
        "--tokens": 2048,
        "--layer": 1,
        "--n-features": 64,
        "--batch": 128,
        "--context": 32,
        "--threads": "1",
        "--json": tmp_path / "result.json",
    }
    script = ROOT / "benchmarks" / "trainer_end_to_end.py"
    arguments = [str(part) for pair in options.items() for part in pair]
    subprocess.run([sys.executable, script, *arguments], cwd=ROOT, check=True)

    (ours,) = json.loads((tmp_path / "result.json").read_text())["contestants"].values()
    assert ours["ratio"] == {"median": 1, "min": 1, "max": 1}
    assert ours["tokens_per_second"] > 0
