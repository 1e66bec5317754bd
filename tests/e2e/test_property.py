"""Random programs for random requests, packed and preempted at random, are what the reference says, one by one.

STEER_TEST_SEEDS, such as 17 or 100-120, runs these cases instead, for a failure that named its seed.
"""

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from steer_server.engine import EngineSettings, VllmEngine
from tests.e2e.cases import check, run_case
from tests.e2e.engines import MODES, modes_of, started
from tests.e2e.models import make_tiny_llama
from tests.e2e.multi_reference import MultiReference
from tests.e2e.random_programs import Draw, make_dictionaries

pytestmark = pytest.mark.e2e

# The KV cache holds two of the longest requests, so that batches are preempted. 32 is the smallest block on CPU.
KV_BLOCKS, BLOCK = 8, 32
CI, NIGHTLY = range(20), range(20, 220)


def _seeds() -> list[object]:
    chosen = os.environ.get("STEER_TEST_SEEDS")
    if chosen:
        first, _, last = chosen.partition("-")
        return list(range(int(first), int(last or first) + 1))
    return [*CI, *(pytest.param(seed, marks=pytest.mark.nightly) for seed in NIGHTLY)]


@pytest.fixture(scope="module")
def tiny(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny"), model_path)


@pytest.fixture(scope="module")
def many(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> MultiReference:
    return MultiReference(tiny, make_dictionaries(tiny, tmp_path_factory.mktemp("many")))


@pytest.fixture(scope="module")
async def small(tiny: Path, many: MultiReference) -> AsyncIterator[VllmEngine]:
    settings = EngineSettings(
        str(tiny),
        tuple(many.sites),
        max_model_len=128,
        max_num_seqs=8,
        max_num_batched_tokens=32,
        dtype="float32",
        enforce_eager=True,
        kv_cache_gib=1,
    )
    few = {"block_size": BLOCK, "num_gpu_blocks_override": KV_BLOCKS}
    async with started(settings, dict(many.dictionaries), **few) as engine:
        assert modes_of(engine) == MODES
        yield engine


def preemptions() -> int:
    """Of all engines of this process."""
    metrics = [metric for metric in REGISTRY.collect() if metric.name == "vllm:num_preemptions"]
    samples = [sample for metric in metrics for sample in metric.samples]
    return int(sum(s.value for s in samples if s.name == "vllm:num_preemptions_total"))


PREEMPTED: dict[int, int] = {}
"""Preemptions by seed."""


@pytest.mark.parametrize("seed", _seeds())
async def test_every_request_of_a_random_batch_is_what_the_reference_says(
    small: VllmEngine, many: MultiReference, seed: int
) -> None:
    vocabulary = small.tokenizer.vocab_size
    jobs = Draw(seed, many.dictionaries, vocabulary, many.continuation).case()
    before = preemptions()

    results = await run_case(small, jobs)

    PREEMPTED[seed] = preemptions() - before
    for job, result in zip(jobs, results, strict=True):
        try:
            check(job, result, many)
        except AssertionError as error:
            error.add_note(f"STEER_TEST_SEEDS={seed}, request {job.name}")
            raise


def test_a_good_part_of_the_batches_were_preempted() -> None:
    if not PREEMPTED:
        pytest.skip("no case ran")

    assert sum(count > 0 for count in PREEMPTED.values()) >= len(PREEMPTED) / 4
