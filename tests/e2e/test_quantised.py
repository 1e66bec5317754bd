"""Edits of a model in int8 against transformers with the same rounding of weights and inputs, in float32."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from steer_server.dictionary.edits import Ablate, AddRelative
from steer_server.dictionary.site import Site
from steer_server.engine import EngineSettings, VllmEngine
from steer_server.program import FeatureEdit, Program, ReadOut
from tests.dictionaries import make_dictionary
from tests.e2e.engines import started
from tests.e2e.helpers import TEXTS, run
from tests.e2e.models import (
    make_int8,
    make_tiny_llama,
    make_with,
    quantise_inputs,
)
from tests.e2e.reference import Reference
from tests.e2e.test_engine import from_one

pytestmark = [pytest.mark.e2e, pytest.mark.nightly, pytest.mark.timeout(900)]

SITE = Site("resid_post", 1)
EDITS = (AddRelative(9, 0.5), Ablate(7))


@pytest.fixture(scope="module")
def setting(model_path: Path, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("quantised")
    tiny = make_tiny_llama(folder / "tiny", model_path)
    int8, meant = make_int8(tiny, folder / "int8")
    stored = make_dictionary(tiny, SITE, folder / "random")
    reference = Reference(make_with(meant, tiny, folder / "meant"), 1, stored.dictionary)
    quantise_inputs(reference.model)
    return int8, stored, reference


@pytest.fixture(scope="module")
async def engine(setting) -> AsyncIterator[VllmEngine]:
    int8, stored, _ = setting
    settings = EngineSettings(
        str(int8),
        (SITE,),
        max_model_len=256,
        max_num_seqs=4,
        dtype="float32",
        enforce_eager=True,
        kv_cache_gib=1,
    )
    async with started(settings, {"random": stored}) as engine:
        yield engine


@pytest.mark.parametrize("edits", [(), EDITS], ids=["plain", "edited"])
async def test_an_int8_model_is_edited_like_its_reference(
    engine: VllmEngine, setting, edits
) -> None:
    _, stored, reference = setting
    program = Program(
        tuple(FeatureEdit("random", edit) for edit in edits), (ReadOut("random", top_k=4),)
    )
    prompts = [reference.tokenize(text) for text in TEXTS]

    outcomes = await asyncio.gather(
        *(run(engine, str(i), prompt, program) for i, prompt in enumerate(prompts))
    )

    for prompt, outcome in zip(prompts, outcomes, strict=True):
        # An input that lies between two of int8's steps may be rounded to either, and then the likeliest token may
        # be another where two are as likely: the reference is asked about vLLM's tokens, not for its own.
        told = [*prompt, *outcome.token_ids]
        scores = reference.score(told, from_one(edits))[len(prompt) - 1 :]
        assert outcome.logprobs == pytest.approx(scores, abs=0.05)
        f = stored.dictionary.encode(reference.generate(told[:-1], 1, from_one(edits)).x)
        features = outcome.features()
        assert sorted(features) == list(range(len(f)))
        for position, row in features.items():
            assert row == pytest.approx({i: float(f[position, i]) for i in row}, abs=0.05)
