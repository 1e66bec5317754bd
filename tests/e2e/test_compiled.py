"""With torch.compile on, and a compile cache that plain vLLM and a server of another site have filled before."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

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
from tests.e2e import test_engine
from tests.e2e.conftest import MODES, modes_of
from tests.e2e.helpers import IOI, program, run
from tests.e2e.reference import Reference
from tests.e2e.test_engine import assert_same, from_one

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

EDITS = (AddRelative(9, 0.5), *(Ablate(feature) for feature in range(100, 900, 100)))


@asynccontextmanager
async def started(model: Path, site: Site = SITE) -> AsyncIterator[VllmEngine]:
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
    llm = AsyncLLM.from_engine_args(
        # max_logprobs as steer has it, for it is part of the compile cache's key.
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
    "starts",
    [
        pytest.param(("after plain vLLM",), id="once"),
        # A start takes a minute and more.
        pytest.param(
            ("after other models", "with its own warm cache"), marks=pytest.mark.nightly, id="twice"
        ),
    ],
)
async def test_compiled_models_keep_the_op_through_warm_and_foreign_compile_caches(
    starts: tuple[str, ...],
    model_path: Path,
    random_dictionary: StoredDictionary,
    reference: Reference,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    # A part of the key; our engine would set it, and plain vLLM would not.
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0-1")
    steered = program(EDITS, ReadOut("random", top_k=8))
    prompt = reference.tokenize(IOI)
    await run_plain_vllm(model_path, prompt)
    if len(starts) > 1:
        async with started(model_path, Site("resid_post", SITE.layer - 5)) as engine:
            await run(engine, "at another site", prompt, tokens=2)
    for start in starts:
        async with started(model_path) as engine:
            await engine.add_dictionary("random", random_dictionary)
            before = await engine.op_calls()
            outcome = await run(engine, start, prompt, steered)
            plain = await run(engine, start + ", no edits", prompt)

            assert await engine.op_calls() == [before[0] + 32]
            assert_same(outcome, reference.generate(prompt, 16, from_one(EDITS)))
            assert_same(plain, reference.generate(prompt, 16, from_one(())))
            assert list(outcome.features()) == list(range(len(prompt) + 15))
            if start == starts[-1]:
                await assert_like_eager(engine, reference, random_dictionary)


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
        engine, reference, stored
    )
