"""Many short requests with edits, updates and aborts leave nothing behind, and full slots make requests wait."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from random import Random
from statistics import median

import psutil
import pytest

from steer_server.admission import MAX_UPDATES
from steer_server.dictionary.edits import AddRelative
from steer_server.engine import EngineSettings, VllmEngine
from steer_server.errors import InvalidRequest, Overloaded
from steer_server.generation import Generation, Sampling
from steer_server.program import FeatureEdit, Program, ReadOut
from tests.e2e.cases import check, run_job
from tests.e2e.engines import MODES, started
from tests.e2e.helpers import run
from tests.e2e.models import make_tiny_llama
from tests.e2e.multi_reference import MultiReference
from tests.e2e.random_programs import N_FEATURES, Job, make_dictionaries

pytestmark = pytest.mark.e2e

SLOTS = 8
AT_ONCE = 16
"""More than the engine's `max_num_seqs`."""


@pytest.fixture(scope="module")
async def many(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> MultiReference:
    tiny = make_tiny_llama(tmp_path_factory.mktemp("tiny"), model_path)
    return MultiReference(tiny, make_dictionaries(tiny, tmp_path_factory.mktemp("many")))


@pytest.fixture(scope="module")
async def tight(many: MultiReference) -> AsyncIterator[VllmEngine]:
    """Little room for everything."""
    settings = EngineSettings(
        many.model.name_or_path,
        tuple(many.sites),
        max_model_len=128,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        dtype="float32",
        enforce_eager=True,
        kv_cache_gib=1,
        edit_slots=SLOTS,
    )
    async with started(settings, dict(many.dictionaries), block_size=32) as engine:
        yield engine


def adds(*features: int, name: str = "tied") -> Program:
    edits = (FeatureEdit(name, AddRelative(feature, 0.1)) for feature in features)
    return Program(tuple(edits), (ReadOut(name, top_k=4),))


class Soak:
    """Sends short requests in which everything is random, `AT_ONCE` at a time."""

    def __init__(self, engine: VllmEngine, seed: int) -> None:
        self._engine = engine
        self._random = Random(seed)
        self._names = list(engine._frontend.admission.dictionaries)
        self._sent = self.aborted = self.updated = self.refused = self.most_held = 0

    async def send(self, count: int) -> None:
        last = self._sent + count

        async def client() -> None:
            while self._sent < last:
                self._sent += 1
                await self._request(f"soak {self._sent}")

        await asyncio.gather(*(client() for _ in range(AT_ONCE)))

    async def _request(self, name: str) -> None:
        random = self._random
        prompt = tuple(random.randrange(3, 40_000) for _ in range(random.randint(3, 12)))
        sampling = Sampling(max_tokens=random.randint(1, 8), temperature=1.0, ignore_eos=True)
        live = random.random() < 0.3
        generation = Generation(name, prompt, sampling, self._program(), live)
        task = asyncio.create_task(self._read(generation))
        if random.random() < 0.2:
            # From before the engine knows of it to long after its end.
            await asyncio.sleep(random.uniform(0, 0.2))
            self.aborted += task.cancel()
        await asyncio.wait([task])
        assert task.cancelled() or task.exception() is None

    async def _read(self, generation: Generation) -> None:
        tokens, finish = 0, None
        async with aclosing(self._engine.generate(generation)) as steps:  # type: ignore[type-var]
            async for step in steps:
                tokens, finish = tokens + len(step.token_ids), step.finish
                self.most_held = max(self.most_held, self._engine.slot_load.held)
                if generation.live and finish is None:
                    await self._update(generation.request_id)
        assert tokens == generation.sampling.max_tokens
        assert finish is not None
        first = [report for report in finish.reports if report.revision == 0]
        assert len(first) == len(generation.program.edits)

    async def _update(self, name: str) -> None:
        try:
            await self._engine.update(name, self._program())
            self.updated += 1
        except Overloaded:
            # With what its generation has edited before it would not fit.
            self.refused += 1

    def _program(self) -> Program:
        features = self._random.sample(range(N_FEATURES), self._random.randint(0, 4))
        return adds(*features, name=self._random.choice(self._names))


def resident_bytes() -> int:
    """Of this process and those it started."""
    mine = psutil.Process()
    return sum(each.memory_info().rss for each in (mine, *mine.children(recursive=True)))


async def assert_nothing_is_left(engine: VllmEngine, name: str) -> None:
    """One more request makes the engine report, and a plain one moves the worker past it."""
    await run(engine, f"{name}, read", (5, 6, 7), Program((), (ReadOut("tied", top_k=1),)), 2)
    await run(engine, f"{name}, plain", (5, 6, 7), tokens=2)

    assert set(engine.slot_load.used.values()) == {0}
    assert engine.slot_load.held == 0
    (kept,) = await engine._llm.collective_rpc("steer_counts")
    assert set(kept.values()) == {0}, kept
    assert engine._running == set()
    assert engine._live == engine._accounts == {}
    assert len(engine._frontend.accounts) <= 1
    assert len(engine._frontend._names) <= 1
    assert engine._llm.output_processor.get_num_unfinished_requests() == 0


async def soak(engine: VllmEngine, count: int) -> tuple[int, int]:
    """Bytes after half and after all of `count` requests; tasks and all else are as before."""
    await run(engine, f"{count}, first", (5, 6, 7), tokens=2)
    tasks = len(asyncio.all_tasks())
    requests = Soak(engine, count)
    await requests.send(count // 2)
    half = resident_bytes()
    await requests.send(count - count // 2)
    whole = resident_bytes()
    await assert_nothing_is_left(engine, f"{count}")

    assert len(asyncio.all_tasks()) == tasks
    assert requests.aborted > count / 20
    assert requests.updated > count / 20
    assert requests.refused > 0
    assert requests.most_held > 0
    return half, whole


async def test_two_hundred_random_requests_leave_nothing_behind(tight: VllmEngine) -> None:
    half, whole = await soak(tight, 200)

    assert half > 0
    assert whole > 0


@pytest.mark.nightly
@pytest.mark.timeout(3000)
async def test_five_thousand_random_requests_leave_memory_where_it_was(tight: VllmEngine) -> None:
    half, whole = await soak(tight, 5000)

    assert whole == pytest.approx(half, rel=0.02)


async def test_when_slots_are_full_requests_wait_and_none_goes_unsteered(
    tight: VllmEngine, many: MultiReference
) -> None:
    jobs = [
        Job(
            f"full {n}",
            tuple(range(100 * n + 10, 100 * n + 20)),
            12,
            adds(*range(4 * n, 4 * n + 4)),
            live=False,
            updates=(),
            abort_after=None,
            pause=0.0,
        )
        for n in range(12)
    ]
    held = []

    async def watch() -> None:
        while True:
            held.append(tight.slot_load.held)
            await asyncio.sleep(0.005)

    watching = asyncio.create_task(watch())
    results = await asyncio.gather(*(run_job(tight, job) for job in jobs))
    watching.cancel()

    for job, result in zip(jobs, results, strict=True):
        check(job, result, many)
    assert max(held) >= 8


async def test_who_waits_behind_an_aborted_request_waits_no_longer(tight: VllmEngine) -> None:
    """The third would find its slots in use by the first, and only has to let the second go before."""
    first = asyncio.create_task(run(tight, "first", (5, 6, 7), adds(*range(8)), tokens=110))
    while max(tight.slot_load.used.values()) < 8:
        await asyncio.sleep(0.01)
    second = asyncio.create_task(run(tight, "second", (5, 6, 7), adds(*range(8, 16))))
    third = asyncio.create_task(run(tight, "third", (5, 6, 7), adds(*range(4)), tokens=4))
    while tight.slot_load.held < 2:
        await asyncio.sleep(0.01)
    second.cancel()
    await third

    assert not first.done()
    await first


async def test_each_of_a_crowd_of_one_token_requests_proves_its_edits(tight: VllmEngine) -> None:
    """vLLM is done with each before its caller has read anything, and takes in the next."""

    async def one(name: str) -> int:
        found = 0
        for number in range(20):
            outcome = await run(tight, f"{name}-{number}", (5, 6, 7), adds(1, 2), tokens=1)
            assert outcome.finish is not None
            found += len(outcome.finish.reports)
        return found

    assert await asyncio.gather(*(one(f"crowd {n}") for n in range(AT_ONCE))) == [40] * AT_ONCE


async def test_updates_hold_one_token_late(tight: VllmEngine) -> None:
    """A client that has seen t tokens sends an update; token t is being computed, so t + 1 is the first under it."""
    others = [asyncio.create_task(run(tight, f"beside {n}", (5, n), tokens=100)) for n in range(7)]
    sampling = Sampling(max_tokens=100, temperature=0.0, ignore_eos=True)
    generation = Generation("late", (5, 6, 7), sampling, adds(1), live=True)
    seen, sent_at, late = 0, {}, []
    async for step in tight.generate(generation):
        seen += len(step.token_ids)
        late += [entry.first_index - sent_at[entry.revision] for entry in step.applied]
        if seen % 4 == 0 and seen < 90:
            sent_at[await tight.update("late", adds(seen % 3))] = seen
    await asyncio.gather(*others)

    assert len(late) == len(sent_at) > 15
    assert median(late) <= (2 if "async" in MODES else 1)


async def test_a_request_that_no_slots_could_ever_hold_is_refused_by_name(
    tight: VllmEngine,
) -> None:
    with pytest.raises(InvalidRequest, match=r"need 9 slots at resid_post\.1, the engine has 8"):
        await run(tight, "nine", (5, 6, 7), adds(*range(9)))


async def test_an_update_that_would_wait_for_its_own_generation_is_refused(
    tight: VllmEngine,
) -> None:
    """Slots of earlier revisions are kept for a replay, so such an update could never hold."""
    sampling = Sampling(max_tokens=24, temperature=0.0, ignore_eos=True)
    generation = Generation("own", (5, 6, 7), sampling, adds(*range(5)), live=True)
    stream = tight.generate(generation)
    await anext(stream)

    assert await tight.update("own", adds(*range(2, 8))) == 1
    with pytest.raises(Overloaded, match=r"edited 9 features at resid_post\.1"):
        await tight.update("own", adds(8))
    steps = [step async for step in stream]
    assert [entry.revision for step in steps for entry in step.applied] == [1]


async def test_a_generation_takes_so_many_updates_and_none_more(tight: VllmEngine) -> None:
    sampling = Sampling(max_tokens=100, temperature=0.0, ignore_eos=True)
    stream = tight.generate(Generation("many", (5, 6, 7), sampling, adds(1), live=True))
    await anext(stream)

    revisions = [await tight.update("many", adds(2)) for _ in range(MAX_UPDATES)]
    with pytest.raises(Overloaded, match=f"at most {MAX_UPDATES} updates"):
        await tight.update("many", adds(2))
    steps = [step async for step in stream]

    assert revisions == list(range(1, MAX_UPDATES + 1))
    assert max(entry.revision for step in steps for entry in step.applied) == MAX_UPDATES
