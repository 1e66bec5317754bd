"""Generations side by side from one prompt, and where they part."""

import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from itertools import zip_longest

import numpy as np
from steer.v1 import steering_pb2

from steer_server.api import events
from steer_server.api.generations import Generations
from steer_server.api.scores import score
from steer_server.api.streams import merged, together
from steer_server.api.wire import ResolvedRequest, read_generation, read_program
from steer_server.errors import InvalidRequest, PromptTooLong
from steer_server.program import Program

MAX_ARMS = 8

_Response = steering_pb2.CompareResponse


async def responses(
    generations: Generations, request_id: str, request: steering_pb2.CompareRequest
) -> AsyncGenerator[_Response, None]:
    """What SteeringService.Compare returns."""
    arms = await _read(generations, request)
    # What the arms drew is scored when their generations have ended.
    with generations.using(arm.program for arm in arms):
        async with aclosing(_responses(generations, request_id, arms)) as found:
            async for response in found:
                yield response


async def _responses(
    generations: Generations, request_id: str, arms: Sequence[ResolvedRequest]
) -> AsyncGenerator[_Response, None]:
    runs = [
        generations.begin("Compare", f"{request_id}:{number}", arm)
        for number, arm in enumerate(arms)
    ]
    tokenizer = generations.engine.tokenizer
    for number, (run, arm) in enumerate(zip(runs, arms, strict=True)):
        yield _Response(arm=number, started=events.started(run.request_id, arm, tokenizer))
    drawn: list[list[int]] = [[] for _ in arms]
    async with aclosing(merged([run.outputs() for run in runs])) as outputs:
        async for number, output in outputs:
            drawn[number] += output.token_ids
            for response in events.tokens(partial(_Response, arm=number), output):
                yield response
            if output.finish:
                yield _Response(arm=number, finished=events.finished(output.finish))
    scores = await together(
        score(
            generations,
            "Compare",
            f"{request_id}:{number}:score",
            arm.prompt_token_ids,
            drawn[0],
            _for_scoring(arm.program, len(arm.prompt_token_ids), len(drawn[0])),
        )
        for number, arm in enumerate(arms)
    )
    baseline = np.array(scores[0].logprobs)
    for number in range(1, len(arms)):
        divergence = _divergence(
            drawn[0], drawn[number], np.array(scores[number].logprobs) - baseline
        )
        yield _Response(arm=number, divergence=divergence)


async def _read(
    generations: Generations, request: steering_pb2.CompareRequest
) -> list[ResolvedRequest]:
    """The arms, the first one first, all with the same seed."""
    served = generations.served
    if not request.HasField("generation"):
        raise InvalidRequest("required", field="generation")
    if not 1 <= len(request.arms) <= MAX_ARMS:
        raise InvalidRequest(f"{len(request.arms)} arms; 1 to {MAX_ARMS}", field="arms")
    first = await read_generation(request.generation, served, "generation")
    length, sampling = len(first.prompt_token_ids), first.sampling
    # The first arm's text is read once more, with room for a token.
    room = served.engine.max_model_len - length - 1
    if room < 1:
        raise PromptTooLong(
            f"{length} tokens; at most {served.engine.max_model_len - 2} here",
            field="generation.prompt",
        )
    seed = secrets.randbits(31) if sampling.seed is None else sampling.seed
    sampling = replace(sampling, seed=seed, max_tokens=min(sampling.max_tokens, room))
    first = replace(first, sampling=sampling)
    programs = [
        read_program(
            arm,
            served,
            length,
            f"arms[{index}]",
            first.program.read_outs,
            computed=sampling.max_tokens,
        )
        for index, arm in enumerate(request.arms)
    ]
    return [first, *(replace(first, program=program) for program in programs)]


def _for_scoring(program: Program, prompt_length: int, drawn: int) -> Program:
    """Its edits that hold somewhere in as many tokens as were drawn, which may be fewer than asked for."""
    rows = prompt_length + drawn
    edits = (e for e in program.edits if e.where.holds_somewhere(rows, prompt_length))
    return replace(program, edits=tuple(edits), read_outs=())


def _divergence(
    first: Sequence[int], other: Sequence[int], changes: np.ndarray
) -> steering_pb2.Divergence:
    apart = (i for i, (a, b) in enumerate(zip_longest(first, other)) if a != b)
    return steering_pb2.Divergence(
        first_index=next(apart, None),
        logprob_changes=changes.tolist(),
        mean_logprob_change=float(changes.mean()) if len(changes) else 0.0,
    )
