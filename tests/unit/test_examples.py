"""What ships in examples/ is what its pages promise."""

import tomllib
from dataclasses import asdict
from pathlib import Path

import pytest

from steer_server.config import resolve
from steer_server.dictionary import files
from steer_server.dictionary.files import StoredDictionary
from trainer.config import load as training
from trainer.paper.config import load as experiments

EXAMPLES = Path(__file__).parents[2] / "examples"
PAPER = EXAMPLES / "paper"
FOLDER = EXAMPLES / "dictionaries" / "smollm2-135m-resid10"


@pytest.fixture(scope="module")
def shipped() -> StoredDictionary:
    return files.load(FOLDER)


def test_the_dictionary_is_small_wide_sparse_and_better_than_pca(shipped: StoredDictionary) -> None:
    quality = shipped.card.quality

    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 8_000_000
    assert shipped.card.n_features == 8 * shipped.card.d_model
    assert quality is not None
    assert quality.l0 < 50
    assert quality.fvu < quality.pca_fvu
    assert quality.dead_share < 0.1


def test_its_labels_are_those_of_the_file_and_rest_on_evidence(shipped: StoredDictionary) -> None:
    content = tomllib.loads((EXAMPLES / "labels.toml").read_text())
    labels = {int(feature): label for feature, label in content["labels"].items()}
    found = {f: entry.label for f, entry in shipped.evidence.items() if entry.label}

    assert content["weights_sha256"] == shipped.sha256
    assert found == labels
    assert len(found) >= 10
    assert all(shipped.evidence[feature].examples for feature in found)


def test_it_was_made_by_the_shipped_configuration(shipped: StoredDictionary) -> None:
    config = tomllib.loads((EXAMPLES / "smollm2-135m.toml").read_text())
    trained = shipped.card.training["config"]

    assert {key: trained[key] for key in config} == config


def test_the_demo_server_serves_and_watches_features_that_are_labelled(
    shipped: StoredDictionary,
) -> None:
    config = resolve({"config": str(EXAMPLES / "server.toml")}, {})

    assert [EXAMPLES.parent / source.folder for source in config.dictionaries] == [FOLDER]
    for name, feature in config.watch:
        assert name == shipped.card.name
        assert shipped.evidence[feature].label


@pytest.mark.parametrize("site", ["resid_post.9", "resid_post.10", "attn_out.10", "mlp_out.10"])
def test_each_of_the_four_sites_is_small_and_as_good_as_its_page_says(site: str) -> None:
    folder = EXAMPLES / "dictionaries" / "smollm2-135m" / site
    card = files.load(folder).card
    quality = card.quality

    assert sum(path.stat().st_size for path in folder.iterdir()) <= 8_000_000
    assert str(card.site) == site
    assert quality is not None
    assert quality.ce_recovered is not None
    row = (
        f"| `{site}` | {quality.l0:.1f} | {quality.fvu:.3f} | {quality.pca_fvu:.3f} "
        f"| {quality.delta_ce:.3f} | {quality.ce_recovered:.3f} | {quality.kl:.3f} "
        f"| {quality.dead_share:.1%} |"
    )
    assert row in (EXAMPLES / "README.md").read_text()
    (config,) = (c for c in training(EXAMPLES / "smollm2-135m-sites.toml") if c.site == site)
    trained = card.training["config"]
    keys = "architecture", "n_features", "k", "lr", "epochs"
    assert all(trained[key] == getattr(config, key) for key in keys)


@pytest.mark.parametrize(
    "path", sorted(PAPER.rglob("*.toml")), ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_a_configuration_of_the_paper_names_dictionaries_that_will_be_there(path: Path) -> None:
    if "trainings" not in tomllib.loads(path.read_text()):
        assert training(path)
        return
    config = experiments(path)
    made = {each.out for entry in config.trainings for each in training(Path(entry))}
    tables = [
        asdict(getattr(config, name)) for name in ("interpretability", "ioi", "cases", "tradeoffs")
    ]
    named = {
        entry
        for table in tables
        for value in table.values()
        for entry in (
            [value] if isinstance(value, str) else value if isinstance(value, tuple) else []
        )
        if isinstance(entry, str) and "/dictionaries/" in entry
    }

    assert named
    for folder in named:
        within = any(out == folder or out.startswith(f"{folder}/") for out in made)
        there = [*Path(folder).glob("dictionary.json"), *Path(folder).glob("*/dictionary.json")]
        assert within or there, folder
