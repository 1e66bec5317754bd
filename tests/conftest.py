"""Where the tests find the real model, and a dictionary made for it on the spot."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from transformers import AutoConfig

from steer_server.dictionary.card import Card, Model, config_digest, model_shape
from steer_server.dictionary.dictionary import Dictionary
from steer_server.dictionary.features import FeatureStatistics
from steer_server.dictionary.files import StoredDictionary, load, save, self_test
from steer_server.dictionary.site import Site

settings.register_profile("steer", deadline=None)
settings.load_profile("steer")

MODEL = Path(os.environ.get("STEER_TEST_MODEL", "models/SmolLM2-135M-Instruct")).resolve()
SITE = Site.parse("resid_post.15")
N_FEATURES = 4608


@pytest.fixture(scope="session")
def model_path() -> Path:
    if not (MODEL / "config.json").is_file():
        pytest.fail(f"no model in {MODEL}; run `make model`, or set STEER_TEST_MODEL")
    return MODEL


@pytest.fixture(scope="session")
def random_dictionary(
    model_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> StoredDictionary:
    """Random unit rows with a bias that leaves some tens of features active on a token."""
    config = model_shape(AutoConfig.from_pretrained(model_path))
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(N_FEATURES, config["hidden_size"], generator=generator)
    dictionary = Dictionary.tied(
        torch.nn.functional.normalize(rows, dim=1), torch.full((N_FEATURES,), -14.0)
    )
    card = Card(
        name="random",
        model=Model(model_path.name, "", config_digest(config)),
        site=SITE,
        d_model=config["hidden_size"],
        n_features=N_FEATURES,
        architecture="tied_relu",
        activation="relu",
        input_scale=1.0,
        center_input=False,
        dtype="float32",
        self_test=self_test(dictionary),
    )
    folder = tmp_path_factory.mktemp("dictionaries") / "random"
    save(folder, card, dictionary, FeatureStatistics.zeros(N_FEATURES))
    return load(folder, config)
