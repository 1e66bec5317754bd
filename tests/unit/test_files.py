"""A dictionary folder: written whole, believed only after checks."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from transformers import GPT2Config

from steer_server.dictionary import files
from steer_server.dictionary.card import Card, Model, Quality, config_digest, model_shape
from steer_server.dictionary.dictionary import Dictionary
from steer_server.dictionary.features import Evidence, Example, FeatureStatistics
from steer_server.dictionary.site import Site
from steer_server.errors import CorruptDictionary, DictionaryMismatch
from tests.unit.strategies import D_MODEL, N_FEATURES, dictionaries, normal

CONFIG = {"model_type": "llama", "hidden_size": D_MODEL, "num_hidden_layers": 4, "vocab_size": 99}


def card_of(dictionary: Dictionary, dtype: str = "float32") -> Card:
    return Card.of(
        dictionary,
        name="test",
        model=Model("tiny", "1", config_digest(CONFIG)),
        site=Site("resid_post", 2),
        architecture="relu",
        dtype=dtype,
        quality=Quality(100, 3.0, 0.2, 0.1, 0.0, 0.5),
        training={"seed": 0},
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = torch.nn.functional.normalize(normal(0, N_FEATURES, D_MODEL).float(), dim=1)
    dictionary = Dictionary.tied(rows, normal(1, N_FEATURES).float())
    evidence = [Evidence(3, "a label", (Example(("a", " b"), (0.0, 1.5)),), (("x", 1.0),), ())]
    statistics = FeatureStatistics.zeros(N_FEATURES)
    files.save(tmp_path / "d", card_of(dictionary), dictionary, statistics, evidence)
    return tmp_path / "d"


@settings(max_examples=20)
@given(dictionaries())
def test_what_is_saved_is_what_is_loaded_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, dictionary: Dictionary
) -> None:
    folder = tmp_path_factory.mktemp("saved") / "d"
    dictionary = dictionary.to(torch.float32)

    card = files.save(folder, card_of(dictionary), dictionary, FeatureStatistics.zeros(N_FEATURES))
    stored = files.load(folder, CONFIG)

    assert stored.card == card
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        assert torch.equal(getattr(stored.dictionary, name), getattr(dictionary, name))


def test_evidence_and_statistics_come_back(folder: Path) -> None:
    stored = files.load(folder)

    assert stored.evidence[3].label == "a label"
    assert stored.evidence[3].examples[0].tokens == ("a", " b")
    assert stored.statistics.quantiles.shape == (N_FEATURES, 6)
    assert stored.card.quality == Quality(100, 3.0, 0.2, 0.1, 0.0, 0.5)
    assert stored.sha256 == stored.card.files["weights.safetensors"]
    assert not (folder / "weights.safetensors").read_bytes().count(b"W_enc")
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}


def test_a_file_that_is_overwritten_in_place_does_not_reach_what_was_loaded(folder: Path) -> None:
    stored = files.load(folder)
    before = stored.dictionary.W_dec.clone()
    with (folder / "weights.safetensors").open("r+b") as file:
        file.seek(-4 * D_MODEL * N_FEATURES, 2)
        file.write(bytes(4 * D_MODEL * N_FEATURES))

    assert torch.equal(stored.dictionary.W_dec, before)


def test_equal_weights_with_another_meaning_are_told_apart(folder: Path) -> None:
    card = files.load(folder).card
    others = [
        replace(card, site=Site("resid_post", 1)),
        replace(card, activation="identity"),
        replace(card, input_scale=0.5),
        replace(card, center_input=True),
        replace(card, files=card.files | {"weights.safetensors": "0"}),
    ]

    assert len({card.arithmetic, *(other.arithmetic for other in others)}) == 6
    assert replace(card, name="other", quality=None).arithmetic == card.arithmetic


def test_half_precision_is_stored_and_the_self_test_knows(tmp_path: Path) -> None:
    dictionary = Dictionary.directions(normal(0, N_FEATURES, D_MODEL).float())

    files.save(
        tmp_path / "d", card_of(dictionary, "float16"), dictionary, FeatureStatistics.zeros(12)
    )

    stored = files.load(tmp_path / "d")
    assert torch.equal(stored.dictionary.W_dec, dictionary.W_dec.half().float())


def test_a_failed_save_leaves_the_old_folder_as_it_was(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    dictionary = files.load(folder).dictionary

    with pytest.raises(TypeError):
        files.save(
            folder,
            replace(card_of(dictionary), training={"seed": object()}),
            dictionary,
            FeatureStatistics.zeros(N_FEATURES),
        )

    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["d"]


def rewrite_weights(folder: Path, **tensors: torch.Tensor) -> None:
    """Changes tensors and mends the hash, so that later checks have their turn."""
    path = folder / "weights.safetensors"
    weights = safetensors.torch.load_file(path) | tensors
    safetensors.torch.save_file(weights, path)
    edit_card(folder, lambda card: card["files"].update({path.name: files._sha256(path)}))


def edit_card(folder: Path, change) -> None:
    path = folder / "dictionary.json"
    card = json.loads(path.read_text())
    change(card)
    path.write_text(json.dumps(card))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda d: (d / "dictionary.json").unlink(), "not a dictionary folder"),
        (lambda d: (d / "dictionary.json").write_text("{"), "cannot be read"),
        (lambda d: edit_card(d, lambda c: c.update(format_version=9)), "format_version 9"),
        (lambda d: edit_card(d, lambda c: c.update(extra=1)), "unknown keys: extra"),
        (lambda d: edit_card(d, lambda c: c.pop("site")), "cannot be read"),
        (lambda d: edit_card(d, lambda c: c.update(activation="gelu")), "gelu"),
        (lambda d: edit_card(d, lambda c: c["files"].clear()), "no hash"),
        (lambda d: edit_card(d, lambda c: c["files"].update({"../x": "0"})), "lacks"),
        (lambda d: truncate(d / "weights.safetensors"), "not the file its card describes"),
        (lambda d: truncate(d / "features.jsonl"), "not the file its card describes"),
        (lambda d: (d / "features.safetensors").unlink(), "lacks features.safetensors"),
        (lambda d: rewrite_weights(d, W_dec=torch.ones(3, 3)), "shape"),
        (lambda d: rewrite_weights(d, b_enc=torch.full((N_FEATURES,), torch.nan)), "not finite"),
        (
            lambda d: rewrite_weights(d, W_dec=torch.zeros(N_FEATURES, D_MODEL)),
            "row of W_dec is zero",
        ),
        (lambda d: rewrite_weights(d, b_enc=torch.ones(N_FEATURES)), "fails its self-test"),
        (lambda d: rewrite_weights(d, W_gate=torch.ones(1)), "no such tensor"),
    ],
)
def test_a_wrong_file_is_refused_with_the_reason(folder: Path, spoil, reason: str) -> None:
    spoil(folder)

    with pytest.raises(CorruptDictionary, match=reason):
        files.load(folder)


def test_a_shape_is_read_under_its_standard_names_whatever_the_config_calls_them() -> None:
    shape = model_shape(GPT2Config(n_embd=32, n_layer=3, n_head=2))

    assert (shape["hidden_size"], shape["num_hidden_layers"]) == (32, 3)
    assert config_digest(shape) != config_digest(model_shape(GPT2Config(n_embd=32, n_layer=4)))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"hidden_size": None}, "names no hidden_size"),
        ({"hidden_size": 16}, "d_model 8, the model 16"),
        ({"num_hidden_layers": 2}, "layers 0..1"),
        ({"vocab_size": 100}, "not that of this model"),
    ],
)
def test_a_dictionary_of_another_model_is_refused(folder: Path, change, reason: str) -> None:
    with pytest.raises(DictionaryMismatch, match=reason):
        files.load(folder, CONFIG | change)


def test_a_dictionary_inside_a_sublayer_has_a_width_of_its_own(folder: Path) -> None:
    card = replace(files.load(folder).card, site=Site("mlp_act", 2))

    files.check_model(card, CONFIG)

    with pytest.raises(DictionaryMismatch, match="not that of this model"):
        files.check_model(card, CONFIG | {"hidden_size": 16})
    with pytest.raises(
        DictionaryMismatch, match=r"trained at mlp_act\.2, which vLLM does not expose"
    ):
        files.check_served(card)
