"""Edits of a model under a LoRA adapter against transformers with the adapter merged into the weights."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from vllm.lora.request import LoRARequest

from steer_server.dictionary.edits import Ablate, AddRelative
from steer_server.dictionary.files import StoredDictionary
from steer_server.engine import EngineSettings, VllmEngine
from tests.conftest import SITE
from tests.e2e.engines import started
from tests.e2e.helpers import IOI, program
from tests.e2e.models import make_lora, make_with
from tests.e2e.raw import run_raw
from tests.e2e.reference import Reference
from tests.e2e.test_engine import from_one

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

EDITS = (AddRelative(9, 0.5), Ablate(7))


@pytest.fixture(scope="module")
def adapter(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Its folder, and the model with it merged in."""
    folder = tmp_path_factory.mktemp("lora")
    adapter, merged = make_lora(model_path, folder / "adapter")
    return adapter, make_with(merged, model_path, folder / "merged")


@pytest.fixture(scope="module")
async def engine(
    model_path: Path, random_dictionary: StoredDictionary
) -> AsyncIterator[VllmEngine]:
    settings = EngineSettings(
        str(model_path),
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
        settings, {"random": random_dictionary}, enable_lora=True, max_lora_rank=8, max_loras=2
    ) as engine:
        yield engine


async def test_edits_under_an_adapter_equal_a_hook_on_the_merged_model(
    engine: VllmEngine,
    reference: Reference,
    random_dictionary: StoredDictionary,
    adapter: tuple[Path, Path],
) -> None:
    """One batch of all four: with and without the adapter, with and without edits."""
    folder, merged = adapter
    lora = LoRARequest("tiny", 1, str(folder))
    models = {None: reference, lora: Reference(merged, SITE.layer, random_dictionary.dictionary)}
    prompt = reference.tokenize(IOI)
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
