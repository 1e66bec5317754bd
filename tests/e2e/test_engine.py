"""The engine against transformers with hooks, in float32, greedy."""

import asyncio
import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from steer_server.dictionary.edits import Ablate, Add, AddRelative, Clamp, Edit, Scale
from steer_server.engine import VllmEngine
from steer_server.errors import DictionaryNotFound, EditNotApplied, EditTooLarge, InvalidRequest
from steer_server.generation import FinishReason, Generation, RevisionApplied, Sampling
from steer_server.program import FeatureEdit, Oversize, Program, ReadOut, Scope
from tests.conftest import SITE
from tests.e2e.helpers import IOI, TEXTS, Outcome, program, run, tokens_of
from tests.e2e.reference import Completion, Reference

pytestmark = pytest.mark.e2e

PROGRAMS: dict[str, Sequence[Edit]] = {
    "no edit": (),
    "add": (Add(11, 30.0),),
    "ablate one": (Ablate(7),),
    "ablate 16": tuple(Ablate(feature) for feature in range(0, 1600, 100)),
    "clamp": (Clamp(3, 40.0),),
    "scale": (Scale(5, 4.0),),
    "add half the norm": (AddRelative(9, 0.5),),
    "several kinds": (Ablate(100), Clamp(200, 15.0), Add(300, -12.0), AddRelative(400, 0.2)),
}


def from_one(edits: Sequence[Edit]):
    """The default scope: everything but position 0."""
    return lambda position: edits if position > 0 else ()


def assert_same(outcome: Outcome, expected: Completion) -> None:
    assert tuple(outcome.token_ids) == expected.token_ids
    assert np.abs(np.subtract(outcome.logprobs, expected.logprobs)).max() < 1e-4


@pytest.mark.parametrize("name", PROGRAMS)
async def test_edits_equal_a_transformers_hook(
    engine: VllmEngine, reference: Reference, name: str
) -> None:
    prompt = await engine.tokenizer.encode(IOI)
    edits = PROGRAMS[name]

    outcome = await run(engine, name, prompt, program(edits))

    assert_same(outcome, reference.generate(prompt, 16, from_one(edits)))
    assert outcome.finish is not None
    assert [r.tokens_in_scope for r in outcome.finish.reports] == [len(prompt) + 14] * len(edits)


async def test_a_mixed_batch_gives_each_request_its_own_program(
    engine: VllmEngine, reference: Reference
) -> None:
    jobs = [
        (name, await engine.tokenizer.encode(TEXTS[i % len(TEXTS)]), edits)
        for i, (name, edits) in enumerate(PROGRAMS.items())
    ]

    outcomes = await asyncio.gather(
        *(run(engine, name, prompt, program(edits)) for name, prompt, edits in jobs)
    )

    for outcome, (_, prompt, edits) in zip(outcomes, jobs, strict=True):
        assert_same(outcome, reference.generate(prompt, 16, from_one(edits)))


async def test_steered_neighbours_leave_plain_requests_bit_identical(engine: VllmEngine) -> None:
    prompts = [await engine.tokenizer.encode(text) for text in TEXTS]

    async def batch(edits: Sequence[Edit]) -> list[Outcome]:
        programs = [Program(), program(edits), Program(), program(edits)]
        return await asyncio.gather(
            *(
                run(engine, f"n{i}", p, q)
                for i, (p, q) in enumerate(zip(prompts, programs, strict=True))
            )
        )

    plain, steered = await batch(()), await batch((AddRelative(9, 0.5), Clamp(3, 40.0)))

    for i in (0, 2):
        assert plain[i].token_ids == steered[i].token_ids
        assert plain[i].logprobs == steered[i].logprobs
    assert plain[1].token_ids != steered[1].token_ids


async def test_a_prompt_in_chunks_is_edited_and_read_like_one_in_whole(
    engine: VllmEngine, reference: Reference
) -> None:
    prompt = (await engine.tokenizer.encode(" ".join(f"chunk {n}," for n in range(99))))[:300]
    edits = (AddRelative(9, 0.3), Ablate(7))

    outcome = await run(engine, "chunks", prompt, program(edits, ReadOut("random", top_k=1)))

    assert_same(outcome, reference.generate(prompt, 16, from_one(edits)))
    assert list(outcome.features()) == list(range(300 + 15))
    assert sum(rows.positions[0] < 300 for rows in outcome.rows) >= 3


async def test_a_stop_text_ends_the_generation_and_the_proof_still_holds(
    engine: VllmEngine,
) -> None:
    prompt = tuple(await engine.tokenizer.encode(IOI))
    plain = await run(engine, "whole", prompt)
    stop = plain.text[4:8]
    sampling = Sampling(max_tokens=16, temperature=0.0, stop=(stop,))
    edits = program((AddRelative(9, 1e-4),))

    steps = [s async for s in engine.generate(Generation("stop", prompt, sampling, edits))]

    assert "".join(step.text for step in steps) == plain.text[: plain.text.index(stop)]
    finish = steps[-1].finish
    assert finish is not None
    assert finish.reason is FinishReason.STOP
    assert finish.reports[0].tokens_in_scope >= len(prompt) + finish.generated_tokens - 2


async def test_edits_too_large_fail_their_own_request_and_nothing_after_it(
    engine: VllmEngine,
) -> None:
    prompt = await engine.tokenizer.encode(IOI)
    before = await run(engine, "before", prompt)

    with pytest.raises(EditTooLarge):
        await run(engine, "huge", prompt, program((AddRelative(9, 1e30),)))

    after = await asyncio.gather(*(run(engine, f"after {i}", prompt) for i in range(8)))
    assert np.isfinite([outcome.logprobs for outcome in after]).all()
    assert all(outcome.token_ids == before.token_ids for outcome in after)


async def test_edits_past_a_programs_limit_are_scaled_down_counted_or_fail_as_it_says(
    engine: VllmEngine, reference: Reference
) -> None:
    prompt = await engine.tokenizer.encode(IOI)
    edits = (Add(11, 30.0), AddRelative(9, 0.5))
    free = program(edits)
    limits = {
        "free": free,
        "clamp": replace(free, max_relative_size=0.3, oversize=Oversize.CLAMP),
        "warn": replace(free, max_relative_size=0.3, oversize=Oversize.WARN),
        "reject": replace(free, max_relative_size=0.3),
        "wide": replace(free, max_relative_size=100.0),
    }

    found = await asyncio.gather(
        *(run(engine, name, prompt, limited, tokens=8) for name, limited in limits.items()),
        return_exceptions=True,
    )

    outcomes = {
        name: outcome
        for name, outcome in zip(limits, found, strict=True)
        if isinstance(outcome, Outcome)
    }
    error = found[list(limits).index("reject")]
    assert isinstance(error, EditTooLarge)
    assert re.search(r"at position 1 .* max_relative_size is 0\.3", str(error))
    assert_same(outcomes["clamp"], reference.generate(prompt, 8, from_one(edits), 0.3))
    unlimited = reference.generate(prompt, 8, from_one(edits))
    for name in ("free", "warn", "wide"):
        assert_same(outcomes[name], unlimited)
    counts = {name: o.finish.limited_tokens for name, o in outcomes.items() if o.finish}
    rows = len(prompt) + 6
    assert counts == {"free": 0, "clamp": rows, "warn": rows, "wide": 0}


async def test_scope_limits_an_edit_to_its_phase_and_positions(
    engine: VllmEngine, reference: Reference
) -> None:
    prompt = await engine.tokenizer.encode(IOI)
    scope = Scope(prompt=False, exclude_positions=frozenset({len(prompt) + 2}))
    edit = AddRelative(9, 0.5)

    outcome = await run(engine, "scope", prompt, Program((FeatureEdit("random", edit, scope),)))

    def edits_at(position: int) -> Sequence[Edit]:
        return (edit,) if position >= len(prompt) and position != len(prompt) + 2 else ()

    assert_same(outcome, reference.generate(prompt, 16, edits_at))
    assert outcome.finish is not None
    assert outcome.finish.reports[0].tokens_in_scope == 14


@pytest.mark.parametrize("plain_first", [True, False])
async def test_the_prefix_cache_never_mixes_programs(
    engine: VllmEngine, reference: Reference, plain_first: bool
) -> None:
    words = "odd" if plain_first else "even"
    prompt = (await engine.tokenizer.encode(" ".join(f"{words} number {n};" for n in range(80))))[
        :300
    ]
    edits = (AddRelative(9, 0.4),)
    expected = {
        "plain": reference.generate(prompt, 16, from_one(())),
        "steered": reference.generate(prompt, 16, from_one(edits)),
    }
    order = ["plain", "steered"] if plain_first else ["steered", "plain"]

    outcomes = [
        (key, await run(engine, key, prompt, program(edits if key == "steered" else ())))
        for key in order * 2
    ]

    assert abs(expected["plain"].logprobs[0] - expected["steered"].logprobs[0]) > 0.01
    for key, outcome in outcomes:
        assert_same(outcome, expected[key])
    cached = [outcome.finish.cached_tokens for _, outcome in outcomes if outcome.finish]
    assert cached == [0, 0, 256, 256]


async def test_an_edit_that_was_refused_is_refused_again_though_its_rows_are_cached(
    engine: VllmEngine, reference: Reference
) -> None:
    """One row of the first block goes past the limit. vLLM gives that block away before the row is computed."""
    prompt = (await engine.tokenizer.encode(" ".join(f"limit number {n};" for n in range(80))))[
        :300
    ]
    edit = FeatureEdit("random", AddRelative(9, 0.5), Scope(positions=frozenset({50})))
    narrow = Program((edit,), max_relative_size=0.3)

    at_once = await asyncio.gather(
        *(run(engine, f"at once {i}", prompt, narrow, tokens=2) for i in range(3)),
        return_exceptions=True,
    )
    for again in range(2):
        with pytest.raises(EditTooLarge, match="at position 50"):
            await run(engine, f"again {again}", prompt, narrow, tokens=2)

    assert all(isinstance(found, EditTooLarge) for found in at_once), at_once
    wide = await run(engine, "wide", prompt, replace(narrow, max_relative_size=1.0))
    expected = reference.generate(prompt, 16, lambda p: (edit.edit,) if p == 50 else ())
    assert_same(wide, expected)


@pytest.mark.parametrize("text", [" ".join(TEXTS), TEXTS[1]], ids=["long", "short"])
async def test_read_out_equals_the_reference_for_prompt_and_generated_tokens(
    engine: VllmEngine, reference: Reference, random_dictionary, text: str
) -> None:
    prompt = await engine.tokenizer.encode(text)
    features = tuple(range(0, 400, 2))
    query = program((), ReadOut("random", top_k=32), ReadOut("random", features=features))

    outcome = await run(engine, "read", prompt, query, tokens=8)

    expected = reference.generate(prompt, 8, from_one(()))
    f = random_dictionary.dictionary.encode(expected.x)
    top = Outcome(rows=[rows for rows in outcome.rows if rows.read_out == 0]).features()
    named = Outcome(rows=[rows for rows in outcome.rows if rows.read_out == 1]).features()
    assert list(top) == list(named) == list(range(len(prompt) + 7))
    for position, row in enumerate(f):
        values, indices = row.topk(32)
        want = {int(i): float(v) for i, v in zip(indices, values, strict=True) if v > 0}
        assert set(top[position]) == set(want)
        # Position 0 has activations above 3,000, of which a float32 knows no thousandths.
        assert top[position] == pytest.approx(want, abs=1e-3, rel=2e-6)
        want = {i: float(row[i]) for i in features if row[i] > 1e-3}
        got = {i: value for i, value in named[position].items() if value > 1e-3}
        assert got == pytest.approx(want, abs=1e-3, rel=2e-6)


async def test_read_out_reports_every_prompt_token_even_when_the_prefix_is_cached(
    engine: VllmEngine,
) -> None:
    prompt = (await engine.tokenizer.encode(" ".join(f"word{n}" for n in range(80))))[:200]
    query = program((), ReadOut("random", top_k=4))
    await run(engine, "warm", prompt)

    outcome = await run(engine, "cached", prompt, query)

    assert list(outcome.features()) == list(range(200 + 15))


async def test_an_update_holds_from_exactly_the_index_it_is_acknowledged_with(
    engine: VllmEngine, reference: Reference
) -> None:
    prompt = await engine.tokenizer.encode(IOI)
    before, after = (Add(11, 20.0),), (AddRelative(9, 0.4), Ablate(11))
    sampling = Sampling(max_tokens=32, temperature=0.0, ignore_eos=True, logprobs=True)
    generation = Generation("live", tuple(prompt), sampling, program(before), live=True)
    outcome, task = Outcome(), None
    async for step in engine.generate(generation):
        outcome.token_ids += step.token_ids
        outcome.logprobs += step.logprobs
        outcome.applied += step.applied
        outcome.finish = step.finish
        if task is None and len(outcome.token_ids) >= 8:
            task = asyncio.create_task(engine.update("live", program(after)))

    assert task is not None
    assert await task == 1
    (applied,) = outcome.applied
    assert applied.revision == 1
    assert 8 <= applied.first_index <= 12
    boundary = len(prompt) + applied.first_index - 1

    def edits_at(position: int) -> Sequence[Edit]:
        return () if position == 0 else before if position < boundary else after

    assert_same(outcome, reference.generate(prompt, 32, edits_at))
    assert outcome.finish is not None
    assert [(r.revision, r.edit) for r in outcome.finish.reports] == [(0, 0), (1, 0), (1, 1)]
    assert outcome.finish.reports[1].tokens_in_scope == 32 - applied.first_index


async def test_an_update_that_comes_before_the_first_token_waits_for_it_and_nothing_else(
    engine: VllmEngine,
) -> None:
    prompt = await engine.tokenizer.encode(IOI)
    task = asyncio.create_task(run(engine, "early", prompt, tokens=12, live=True))
    await asyncio.sleep(0)

    assert await engine.update("early", program((Add(1, 9.0),))) == 1
    assert await engine.update("early", program((Add(2, 9.0),))) == 2
    outcome = await task

    assert [entry.revision for entry in outcome.applied] == [1, 2]
    # It may catch up with the request before the first step; under async scheduling two steps pass until it holds.
    assert {entry.first_index for entry in outcome.applied} <= {0, 1, 2, 3, 4, 5}
    assert outcome.finish is not None
    first = outcome.applied[-1].first_index
    rows = 12 - first if first else len(prompt) + 10
    assert outcome.finish.reports[-1].tokens_in_scope == rows


async def test_an_update_holds_from_exactly_the_index_it_names(
    engine: VllmEngine, reference: Reference
) -> None:
    prompt = await engine.tokenizer.encode(IOI)
    before, after, last = (Add(11, 20.0),), (AddRelative(9, 0.4),), (Ablate(11),)
    running = asyncio.create_task(run(engine, "at", prompt, program(before), tokens=16, live=True))
    await asyncio.sleep(0)

    assert await engine.update("at", program(after), 6) == 1
    assert await engine.update("at", program(last), 10) == 2
    outcome = await running

    row = len(prompt) - 1
    assert outcome.applied == [RevisionApplied(1, 6, row + 6), RevisionApplied(2, 10, row + 10)]

    def edits_at(position: int) -> Sequence[Edit]:
        token = position - len(prompt) + 1
        held = before if token < 6 else after if token < 10 else last
        return held if position else ()

    assert_same(outcome, reference.generate(prompt, 16, edits_at))
    assert outcome.finish is not None
    assert [r.tokens_in_scope for r in outcome.finish.reports] == [len(prompt) + 4, 4, 6]


async def test_a_paused_generation_waits_and_then_goes_on_as_if_nothing_had_happened(
    engine: VllmEngine, reference: Reference
) -> None:
    prompt, edits = await engine.tokenizer.encode(IOI), (Add(11, 20.0),)
    changed = (AddRelative(9, 0.4),)
    query = program(edits, ReadOut("random", top_k=4))
    paused = Outcome()
    task = asyncio.create_task(run(engine, "paused", prompt, query, 16, True, outcome=paused))
    beside = [
        asyncio.create_task(run(engine, f"beside {i}", await engine.tokenizer.encode(text)))
        for i, text in enumerate(TEXTS[:2])
    ]
    await tokens_of(paused, 3)
    await engine.pause("paused")
    await engine.pause("paused")
    await engine.update("paused", program(changed), 12)
    others = await asyncio.gather(*beside)
    await run(engine, "after", prompt, tokens=4)
    seen = len(paused.token_ids)
    await engine.resume("paused")
    outcome = await task

    # The tokens of the steps that were under way as the pause came.
    assert 3 <= seen <= 7
    assert outcome.applied == [RevisionApplied(1, 12, len(prompt) + 11)]

    def edits_at(position: int) -> Sequence[Edit]:
        return () if not position else edits if position < len(prompt) + 11 else changed

    assert_same(outcome, reference.generate(prompt, 16, edits_at))
    assert list(outcome.features()) == list(range(len(prompt) + 11))
    assert outcome.finish is not None
    assert [r.tokens_in_scope for r in outcome.finish.reports] == [len(prompt) + 10, 4]
    assert_same(others[0], reference.generate(prompt, 16, from_one(())))


async def test_a_pause_does_not_change_what_a_seed_draws(engine: VllmEngine) -> None:
    prompt, edits = await engine.tokenizer.encode(IOI), program((Add(11, 20.0),))
    undisturbed = await run(engine, "whole", prompt, edits, tokens=12, live=True, seed=3)
    paused = Outcome()
    task = asyncio.create_task(
        run(engine, "seed", prompt, edits, 12, live=True, seed=3, outcome=paused)
    )
    for count in (2, 6):
        await tokens_of(paused, count)
        await engine.pause("seed")
        await asyncio.sleep(0.2)
        await engine.resume("seed")

    assert (await task).token_ids == undisturbed.token_ids


async def test_a_paused_generation_can_be_closed_and_an_ended_one_cannot_be_paused(
    engine: VllmEngine,
) -> None:
    prompt = await engine.tokenizer.encode(IOI)
    paused = Outcome()
    task = asyncio.create_task(
        run(engine, "closed", prompt, program((Ablate(1),)), 500, live=True, outcome=paused)
    )
    await tokens_of(paused, 2)
    await engine.pause("closed")
    await asyncio.sleep(0.2)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)

    for change in (engine.pause, engine.resume):
        with pytest.raises(InvalidRequest, match="not live"):
            await change("closed")
    again = await run(engine, "closed", prompt, program((Ablate(1),)), tokens=4)
    assert len(again.token_ids) == 4


async def test_closing_a_generation_aborts_it_and_frees_its_name(engine: VllmEngine) -> None:
    prompt = tuple(await engine.tokenizer.encode(IOI))
    long = Sampling(max_tokens=500, temperature=0.0, ignore_eos=True)
    stream = engine.generate(Generation("gone", prompt, long, program((Ablate(1),))))
    await anext(stream)
    await stream.aclose()

    again = await run(engine, "gone", prompt, program((Ablate(1),)), tokens=4)

    assert len(again.token_ids) == 4


async def test_requests_that_cannot_be_carried_out_are_refused(engine: VllmEngine) -> None:
    prompt = await engine.tokenizer.encode(IOI)

    with pytest.raises(DictionaryNotFound, match="nobody"):
        await run(engine, "x", prompt, program((Ablate(1),), name="nobody"))
    with pytest.raises(InvalidRequest, match="not live"):
        await engine.update("nobody", Program())
    with pytest.raises(InvalidRequest, match="not above 0") as caught:
        await run(engine, "x", prompt, Program(max_relative_size=-1.0))
    assert caught.value.field == "max_relative_size"
    task = asyncio.create_task(run(engine, "index", prompt, tokens=1, live=True))
    await asyncio.sleep(0)
    with pytest.raises(InvalidRequest, match="count from 0") as caught:
        await engine.update("index", Program(), -1)
    assert caught.value.field == "at_index"
    await task


async def test_the_self_test_passes_and_the_model_calls_the_op_once_a_step(
    engine: VllmEngine,
) -> None:
    await engine.self_test()
    before = await engine.op_calls()

    await run(engine, "steps", await engine.tokenizer.encode(IOI), tokens=10)

    assert await engine.op_calls() == [before[0] + 10]


async def test_the_self_test_fails_if_what_is_read_is_not_what_was_written(
    engine: VllmEngine,
) -> None:
    # Unlike the sentinel's, a random feature's encoder does not read what its decoder has written.
    with pytest.raises(EditNotApplied, match=r"50\.0 was written at resid_post\..* was read there"):
        await engine._test_site("random", SITE)


async def test_the_self_test_fails_if_the_output_does_not_change(
    engine: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = engine._first_token

    async def deaf(program: Program) -> tuple[float, dict[int, list[float]]]:
        _, found = await ask(program)
        return -1.0, found

    monkeypatch.setattr(engine, "_first_token", deaf)

    with pytest.raises(EditNotApplied, match="did not reach the output: log-probability -1"):
        await engine.self_test()
