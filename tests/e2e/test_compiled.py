"""With torch.compile on, and a compile cache that plain vLLM and a server of another site have filled before."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.inputs import TokensPrompt
from vllm.v1.engine.async_llm import AsyncLLM

from steer_server.dictionary.edits import Ablate, AddRelative
from steer_server.dictionary.files import StoredDictionary
from steer_server.dictionary.site import Site
from steer_server.engine import EngineSettings, VllmEngine
from steer_server.program import ReadOut
from tests.conftest import SITE
from tests.dictionaries import make_dictionary
from tests.e2e import test_engine
from tests.e2e.engines import MODES, modes_of, use_cache
from tests.e2e.helpers import IOI, program, run
from tests.e2e.models import make_tiny_llama
from tests.e2e.reference import Reference
from tests.e2e.test_engine import assert_same, from_one

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

EDITS = (AddRelative(9, 0.5), *(Ablate(feature) for feature in range(100, 900, 100)))


class Setting(NamedTuple):
    model: Path
    site: Site
    elsewhere: Site
    stored: StoredDictionary
    reference: Reference


@pytest.fixture
def tiny(model_path: Path, tmp_path: Path) -> Setting:
    """The random model of 4 layers, which compiles in a fifth of the time."""
    model, site = make_tiny_llama(tmp_path / "tiny", model_path), Site("resid_post", 2)
    stored = make_dictionary(model, site, tmp_path / "random", per_dimension=16)
    reference = Reference(model, site.layer, stored.dictionary)
    return Setting(model, site, Site("resid_post", 1), stored, reference)


@pytest.fixture
def real(model_path: Path, random_dictionary: StoredDictionary, reference: Reference) -> Setting:
    elsewhere = Site("resid_post", SITE.layer - 5)
    return Setting(model_path, SITE, elsewhere, random_dictionary, reference)


@asynccontextmanager
async def started(model: Path, site: Site) -> AsyncIterator[VllmEngine]:
    settings = EngineSettings(
        str(model), (site,), max_model_len=512, max_num_seqs=4, dtype="float32", kv_cache_gib=1
    )
    engine = await VllmEngine.start(settings)
    try:
        assert modes_of(engine) == MODES
        yield engine
    finally:
        await engine.shutdown()


async def run_plain_vllm(model: Path, prompt: list[int]) -> None:
    """Fills the compile cache; the settings are those of `started` as far as they are part of its key."""
    llm = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=str(model), max_model_len=512, max_num_seqs=4, dtype="float32", max_logprobs=-1
        )
    )
    try:
        async for _ in llm.generate(
            TokensPrompt(prompt_token_ids=prompt), SamplingParams(max_tokens=2), "plain"
        ):
            pass
    finally:
        llm.shutdown()


@pytest.mark.parametrize(
    ("size", "starts"),
    [
        ("tiny", ("after plain vLLM",)),
        # A start takes minutes.
        pytest.param(
            "real",
            ("after other models", "with its own warm cache"),
            marks=pytest.mark.nightly,
        ),
    ],
    ids=["tiny", "real"],
)
async def test_compiled_models_keep_the_op_through_warm_and_foreign_compile_caches(
    size: str,
    starts: tuple[str, ...],
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_cache(tmp_path / "cache", monkeypatch)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    setting: Setting = request.getfixturevalue(size)
    model, reference = setting.model, setting.reference
    steered = program(EDITS, ReadOut("random", top_k=8))
    prompt = reference.tokenize(IOI)
    await run_plain_vllm(model, prompt)
    if len(starts) > 1:
        async with started(model, setting.elsewhere) as engine:
            await run(engine, "at another site", prompt, tokens=2)
    for start in starts:
        async with started(model, setting.site) as engine:
            await engine.add_dictionary("random", setting.stored)
            before = await engine.op_calls()
            outcome = await run(engine, start, prompt, steered)
            plain = await run(engine, start + ", no edits", prompt)

            assert await engine.op_calls() == [before[0] + 32]
            assert_same(outcome, reference.generate(prompt, 16, from_one(EDITS)))
            assert_same(plain, reference.generate(prompt, 16, from_one(())))
            assert list(outcome.features()) == list(range(len(prompt) + 15))
            if start == starts[-1]:
                await assert_like_eager(engine, reference, setting.stored)


async def assert_like_eager(
    engine: VllmEngine, reference: Reference, stored: StoredDictionary
) -> None:
    """The eager engine's tests that do not depend on its settings."""
    for name in test_engine.PROGRAMS:
        await test_engine.test_edits_equal_a_transformers_hook(engine, reference, name)
    await test_engine.test_a_mixed_batch_gives_each_request_its_own_program(engine, reference)
    await test_engine.test_steered_neighbours_leave_plain_requests_bit_identical(engine)
    for plain_first in (True, False):
        await test_engine.test_the_prefix_cache_never_mixes_programs(engine, reference, plain_first)
    await test_engine.test_read_out_equals_the_reference_for_prompt_and_generated_tokens(
        engine, reference, stored, IOI
    )
