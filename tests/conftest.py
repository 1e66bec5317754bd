"""Where the tests find the real model, and a dictionary made for it on the spot."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

from steer_server.dictionary.files import StoredDictionary
from steer_server.dictionary.site import Site
from tests.dictionaries import make_dictionary

settings.register_profile("steer", deadline=None)
settings.load_profile("steer")

MODEL = Path(os.environ.get("STEER_TEST_MODEL", "models/SmolLM2-135M-Instruct")).resolve()
SITE = Site.parse("resid_post.15")


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
    folder = tmp_path_factory.mktemp("dictionaries") / "random"
    return make_dictionary(model_path, SITE, folder, per_dimension=8, bias=-14.0)
