"""Edits of a model under a LoRA adapter against transformers with the adapter merged into the weights."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from vllm.lora.request import LoRARequest

from steer_server.dictionary.edits import Ablate, AddRelative
from steer_server.dictionary.site import Site
from steer_server.engine import EngineSettings, VllmEngine
from tests.dictionaries import make_dictionary
from tests.e2e.engines import started
from tests.e2e.helpers import IOI, program
from tests.e2e.models import make_lora, make_tiny_llama, make_with
from tests.e2e.raw import run_raw
from tests.e2e.reference import Reference
from tests.e2e.test_engine import from_one

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

SITE = Site("resid_post", 1)
EDITS = (AddRelative(9, 0.5), Ablate(7))


@pytest.fixture(scope="module")
def setting(model_path: Path, tmp_path_factory: pytest.TempPathFactory):
    """The model, an adapter, a dictionary, and references without and with the adapter merged in."""
    folder = tmp_path_factory.mktemp("lora")
    tiny = make_tiny_llama(folder / "tiny", model_path)
    adapter, merged = make_lora(tiny, folder / "adapter")
    stored = make_dictionary(tiny, SITE, folder / "random")
    folders = (tiny, make_with(merged, tiny, folder / "merged"))
    references = [Reference(model, SITE.layer, stored.dictionary) for model in folders]
    return tiny, adapter, stored, references


@pytest.fixture(scope="module")
async def engine(setting) -> AsyncIterator[VllmEngine]:
    tiny, _, stored, _ = setting
    settings = EngineSettings(
        str(tiny),
        (SITE,),
        max_model_len=256,
        max_num_seqs=4,
        dtype="float32",
        enforce_eager=True,
        kv_cache_gib=1,
    )
    # One slot more than adapters: on CPU vLLM gives rows without an adapter the last slot's weights, zero while it is
    # empty (index -1 in vllm/lora/ops/torch_ops/lora_ops.py).
    async with started(
        settings, {"random": stored}, enable_lora=True, max_lora_rank=8, max_loras=2
    ) as engine:
        yield engine


async def test_edits_under_an_adapter_equal_a_hook_on_the_merged_model(
    engine: VllmEngine, setting
) -> None:
    """One batch of all four: with and without the adapter, with and without edits."""
    _, adapter, _, (plain, merged) = setting
    models = {None: plain, LoRARequest("tiny", 1, str(adapter)): merged}
    prompt = plain.tokenize(IOI)
    jobs = [(model, edits) for model in models for edits in ((), EDITS)]

    outcomes = await asyncio.gather(
        *(
            run_raw(engine, f"job {i}", prompt, program(edits), lora=model)
            for i, (model, edits) in enumerate(jobs)
        )
    )

    expected = [models[model].generate(prompt, 16, from_one(edits)) for model, edits in jobs]
    assert [outcome.token_ids[0] for outcome in outcomes] == [list(e.token_ids) for e in expected]
    assert len({tuple(outcome.token_ids[0]) for outcome in outcomes}) == 4
    for outcome, want in zip(outcomes, expected, strict=True):
        assert outcome.logprobs == pytest.approx(want.logprobs, abs=1e-3)
