"""One eager engine and one reference model for all end-to-end tests."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from steer_server.dictionary.files import StoredDictionary
from steer_server.engine import EngineSettings, VllmEngine
from tests.conftest import SITE
from tests.e2e.reference import Reference


@pytest.fixture(scope="session")
async def engine(
    model_path: Path, random_dictionary: StoredDictionary
) -> AsyncIterator[VllmEngine]:
    settings = EngineSettings(
        str(model_path),
        (SITE,),
        max_model_len=1024,
        max_num_seqs=16,
        # Prompts of the longer tests come in chunks.
        max_num_batched_tokens=128,
        dtype="float32",
        enforce_eager=True,
        kv_cache_gib=1,
    )
    engine = await VllmEngine.start(settings)
    await engine.add_dictionary("random", random_dictionary)
    yield engine
    await engine.shutdown()


@pytest.fixture(scope="session")
def reference(model_path: Path, random_dictionary: StoredDictionary) -> Reference:
    return Reference(model_path, SITE.layer, random_dictionary.dictionary)
