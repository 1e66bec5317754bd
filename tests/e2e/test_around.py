"""Edits together with what else vLLM does to a request: grammars, several sequences, cached turns, aborts."""

import asyncio
import re

import numpy as np
import pytest
from vllm.sampling_params import StructuredOutputsParams

from steer_server.dictionary.edits import Ablate, AddRelative
from steer_server.engine import VllmEngine
from steer_server.generation import Generation, Sampling
from steer_server.program import FeatureEdit, Program, ReadOut, Scope
from tests.e2e.helpers import IOI, program, run
from tests.e2e.raw import run_raw
from tests.e2e.reference import Reference
from tests.e2e.test_engine import assert_same, from_one

pytestmark = pytest.mark.e2e

EDITS = (AddRelative(9, 0.5), Ablate(7))


async def test_between_two_allowed_texts_each_request_takes_what_its_own_model_says(
    engine: VllmEngine, reference: Reference
) -> None:
    prompt = reference.tokenize(IOI)
    plain, edited = [
        engine._llm.get_tokenizer().decode(reference.generate(prompt, 8, from_one(e)).token_ids)
        for e in ((), EDITS)
    ]
    assert plain != edited
    either = StructuredOutputsParams(choice=[plain, edited])

    outcomes = await asyncio.gather(
        run_raw(engine, "plain", prompt, structured_outputs=either),
        run_raw(engine, "edited", prompt, program(EDITS), structured_outputs=either),
    )

    assert [outcome.text for outcome in outcomes] == [plain, edited]


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        (StructuredOutputsParams(regex="[0-9]{4}-[0-9]{2}"), r"\d{4}-\d{2}"),
        (
            StructuredOutputsParams(grammar='root ::= "{\\"a\\": " ("true" | "false") "}"'),
            r'\{"a": (true|false)\}',
        ),
    ],
    ids=["regex", "grammar"],
)
async def test_an_edited_text_obeys_the_grammar_and_every_row_was_edited(
    engine: VllmEngine, reference: Reference, grammar: StructuredOutputsParams, pattern: str
) -> None:
    prompt = reference.tokenize(IOI)
    edits = program((AddRelative(9, 2.0),))

    outcome = await run_raw(
        engine, "guided", prompt, edits, structured_outputs=grammar, max_tokens=32
    )

    assert re.fullmatch(pattern, outcome.text), outcome.text
    rows = len(prompt) + len(outcome.token_ids[0]) - 2
    assert [report.tokens_in_scope for report in outcome.reports[0]] == [rows]


async def test_prompt_logprobs_are_those_of_the_edited_model(
    engine: VllmEngine, reference: Reference
) -> None:
    prompt = reference.tokenize(IOI)

    outcome = await run_raw(engine, "score", prompt, program(EDITS), prompt_logprobs=0)

    got = [
        entry[token].logprob
        for entry, token in zip(outcome.output.prompt_logprobs[1:], prompt[1:], strict=True)
    ]
    assert np.abs(np.subtract(got, reference.score(prompt, from_one(EDITS)))).max() < 1e-4


async def test_each_of_several_sequences_is_edited(
    engine: VllmEngine, reference: Reference
) -> None:
    """vLLM makes a request of each; at its lowest temperature they all take the likeliest tokens."""
    prompt = reference.tokenize(IOI)

    outcome = await run_raw(engine, "three", prompt, program(EDITS), n=3, temperature=0.01, seed=0)

    expected = reference.generate(prompt, 16, from_one(EDITS))
    assert outcome.token_ids == [list(expected.token_ids)] * 3
    assert [[r.tokens_in_scope for r in each] for each in outcome.reports] == [
        [len(prompt) + 14] * 2
    ] * 3


async def test_the_next_turn_of_an_edited_conversation_reads_the_cache(
    engine: VllmEngine, reference: Reference
) -> None:
    first = reference.tokenize(" ".join(f"turn {n}," for n in range(60)))[:140]
    edits = program(EDITS, ReadOut("random", top_k=1, complete=False))
    answer = await run(engine, "turn 1", first, edits)
    second = [*first, *answer.token_ids, *reference.tokenize(" And then? It")]

    outcome = await run(engine, "turn 2", second, edits)

    assert outcome.finish is not None
    assert outcome.finish.cached_tokens == 128
    assert min(outcome.features()) == 128
    assert_same(outcome, reference.generate(second, 16, from_one(EDITS)))


async def test_a_turn_that_was_edited_as_generated_is_not_taken_for_an_unedited_prompt(
    engine: VllmEngine, reference: Reference
) -> None:
    """With edits of generated tokens only, the first answer is a part of the second prompt, where they do not hold."""
    scope = Scope(prompt=False)
    edits = Program(tuple(FeatureEdit("random", edit, scope) for edit in EDITS))
    first = reference.tokenize(" ".join(f"answer {n}," for n in range(60)))[:140]
    answer = await run(engine, "answer 1", first, edits, tokens=130)
    second = [*first, *answer.token_ids, *reference.tokenize(" And then? It")]

    outcome = await run(engine, "answer 2", second, edits)

    expected = reference.generate(second, 16, lambda p: EDITS if p >= len(second) else ())
    assert_same(outcome, expected)


async def test_an_aborted_request_leaves_nothing_to_the_next(
    engine: VllmEngine, reference: Reference
) -> None:
    prompt = tuple(reference.tokenize(IOI))
    sampling = Sampling(max_tokens=64, temperature=0.0, ignore_eos=True)
    stream = engine.generate(Generation("left", prompt, sampling, program(EDITS)))
    async for step in stream:
        if step.first_index >= 3:
            break
    await stream.aclose()  # type: ignore[attr-defined]

    outcome = await run(engine, "left", prompt)

    assert_same(outcome, reference.generate(prompt, 16, from_one(())))
    assert engine._llm.output_processor.get_num_unfinished_requests() == 0
