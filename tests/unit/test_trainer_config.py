"""Configuration: what is wrong is named, with what is allowed."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from steer_server.errors import SteerError
from trainer.cli import parser
from trainer.config import TrainConfig, digest, expand, from_mapping, load
from trainer.errors import BadConfig

GOOD = {
    "model": "models/m",
    "site": "resid_post.3",
    "corpus": {"a.txt": 1.0},
    "out": "out",
    "tokens": 1000,
    "n_features": 64,
    "k": 8,
}
TOML = """
model = "models/m"
site = "resid_post.3"
out = "out"
tokens = 1000
n_features = 64
k = 8
[corpus]
"a.txt" = 1
"""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"speed": 1, "size": 2}, "unknown keys: size, speed; known are model, site"),
        ({"site": "residual.3"}, "site 'residual.3' is not one of resid_post, mlp_out, attn_out"),
        ({"tokens": "many"}, "tokens is 'many'; it must be int"),
        ({"tokens": True}, "tokens is True; it must be int"),
        ({"tokens": 0}, "tokens is 0, it must be above 0"),
        ({"alpha": -1.0}, "alpha is -1.0, it must not be negative"),
        ({"loss_reduction": "max"}, "loss_reduction is 'max'; allowed are mean, sum"),
        ({"k": 0}, "k is 0; batch_top_k needs one from 1 to n_features, 64"),
        ({"k": 65}, "k is 65; batch_top_k needs one from 1 to n_features, 64"),
        ({"architecture": "relu"}, "k is 8, but relu takes alpha instead"),
        ({"architecture": "dense"}, "architecture is 'dense'; allowed are batch_top_k, top_k"),
        ({"prefixes": [0.5, 1.0]}, "decay and prefixes are shares"),
        ({"preset": "papers"}, "preset is 'papers'; allowed are modern, paper"),
        ({"preset": ["paper"]}, r"preset is \['paper'\]; allowed are modern, paper"),
        ({"source": "vllm", "storage": "buffer"}, "storage is 'buffer'; with source = \"vllm\" it"),
        ({"source": "vllm", "weights": "random"}, "weights is 'random'; with source = \"vllm\" it"),
        ({"source": "jax"}, "source is 'jax'; allowed are transformers, vllm"),
        ({"served_dtype": "float32"}, "served_dtype is 'float32', which is for source = \"vllm\""),
        ({"context": 2}, "context is 2; with skip_positions 1 it must be at least 3"),
        ({"corpus": {}}, "corpus needs at least one entry"),
        ({"corpus": "a.txt"}, "corpus is 'a.txt'; it must be a table"),
    ],
)
def test_a_wrong_key_or_value_is_named(change: dict, message: str) -> None:
    with pytest.raises(BadConfig, match=message):
        from_mapping(GOOD | change)


def test_a_missing_key_is_named() -> None:
    with pytest.raises(BadConfig, match="'n_features'"):
        from_mapping({key: value for key, value in GOOD.items() if key != "n_features"})


def test_overrides_are_toml_values_or_plain_text(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(TOML)
    overrides = ["site=mlp_out.7", "lr=2e-3", 'corpus={"b.txt" = 2.0}', "normalise_input=false"]

    (config,) = load(tmp_path / "c.toml", overrides)

    assert (config.site, config.lr, config.normalise_input) == ("mlp_out.7", 2e-3, False)
    assert config.corpus == {"b.txt": 2.0}
    with pytest.raises(BadConfig, match="not key=value"):
        load(tmp_path / "c.toml", ["alpha"])


def test_runs_share_a_harvest_unless_the_activations_differ() -> None:
    config = from_mapping(GOOD)
    other_k = from_mapping(GOOD | {"k": 5, "out": "elsewhere"})

    assert config.harvest_digest == other_k.harvest_digest
    assert digest([config]) != digest([other_k])
    assert digest([config]) == digest([from_mapping(GOOD | {"out": "elsewhere"})])
    assert config.harvest_digest == from_mapping(GOOD | {"site": "mlp_out.3"}).harvest_digest
    vllm = {"source": "vllm"}
    others = ({"context": 64}, vllm, vllm | {"served_dtype": "float32"})
    assert len({from_mapping(GOOD | change).harvest_digest for change in ({}, *others)}) == 4


def test_the_shipped_configuration_is_valid() -> None:
    (config,) = load(Path(__file__).parents[2] / "examples" / "smollm2-135m.toml")

    assert isinstance(config, TrainConfig)
    assert config.alpha > 0


def test_lists_of_values_are_a_dictionary_of_each_combination() -> None:
    sweep = expand(GOOD | {"architecture": ["top_k", "matryoshka"], "k": [4, 8], "seed": 3})

    assert [(c.architecture, c.k, c.seed, c.out) for c in sweep] == [
        ("top_k", 4, 3, "out/top_k-k4"),
        ("top_k", 8, 3, "out/top_k-k8"),
        ("matryoshka", 4, 3, "out/matryoshka-k4"),
        ("matryoshka", 8, 3, "out/matryoshka-k8"),
    ]
    with pytest.raises(BadConfig, match="must list each value once"):
        expand(GOOD | {"k": [4, 4]})


def test_the_papers_preset_is_the_paper_to_the_letter() -> None:
    plain = {key: value for key, value in GOOD.items() if key != "k"}

    paper = asdict(from_mapping(plain | {"preset": "paper"}))

    expected = {
        "architecture": "tied_relu",
        "alpha": 8.6e-4,
        "loss_reduction": "mean",
        "normalise_input": False,
        "epochs": 1,
        "batch": 256,
        "lr": 1e-3,
        "warmup": 0,
        "decay": 0.0,
        "sparsity_warmup": 0,
        "clip": 0.0,
        "aux_k": -1,
        "context": 256,
        "skip_positions": 0,
        "max_norm_ratio": 0.0,
        "activation_dtype": "float16",
        "seed": 0,
        "data_seed": 0,
    }
    assert {key: paper[key] for key in expected} == expected
    rest = set(paper) - set(expected)
    modern = asdict(from_mapping(GOOD))
    assert {key for key in rest if paper[key] != modern[key]} == {"k"}


def test_a_files_own_keys_go_before_its_preset(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text('preset = "paper"\nlr = 5e-4\n' + TOML.replace("k = 8", ""))

    (config,) = load(tmp_path / "c.toml", ["alpha=0.002"])

    assert (config.architecture, config.lr, config.alpha) == ("tied_relu", 5e-4, 0.002)
    assert from_mapping(GOOD | {"preset": "modern"}) == from_mapping(GOOD)
    assert from_mapping(asdict(config)) == config


def test_help_explains_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(["train", "--help"])

    shown = capsys.readouterr().out
    assert "  alpha = 0.0\n      Weight of the sparsity term" in shown
    assert "  batch = 1024\n" in shown
    assert 'arXiv 2309.08600, architecture = "tied_relu"' in shown


def test_trainer_errors_are_steer_errors() -> None:
    assert issubclass(BadConfig, SteerError)


@pytest.mark.parametrize(
    ("change", "steps", "rate"),
    [
        ({}, 1_000_000, 4e-4),
        ({}, 25_000, 8e-4),
        ({}, 400, 4e-3),
        ({"lr": 1e-3}, 400, 1e-3),
        ({"architecture": "relu", "k": 0, "alpha": 1.0}, 400, 4e-4),
    ],
)
def test_the_default_learning_rate_is_higher_for_short_trainings_with_a_k(
    change: dict[str, Any], steps: int, rate: float
) -> None:
    content = {"model": "m", "site": "resid_post.1", "corpus": {"a.txt": 1.0}, "out": "o"}
    config = from_mapping(content | {"tokens": 1, "n_features": 4096, "k": 8} | change)

    assert config.learning_rate(steps) == pytest.approx(rate)
