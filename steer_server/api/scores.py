"""How likely given texts are under edits: teacher-forced, nothing is drawn."""

from collections.abc import Sequence
from contextlib import aclosing
from typing import NamedTuple

from steer.v1 import steering_pb2

from steer_server.api import events
from steer_server.api.edits import write_edits
from steer_server.api.generations import Generations
from steer_server.api.prompts import read_continuation, read_prompt
from steer_server.api.streams import together
from steer_server.api.wire import ResolvedRequest, read_program
from steer_server.errors import EngineUnavailable, InvalidRequest
from steer_server.generation import EditReport, Sampling
from steer_server.program import Program

MAX_CONTINUATIONS = 64


class Score(NamedTuple):
    """Of the tokens that were forced."""

    logprobs: tuple[float, ...]
    reports: tuple[EditReport, ...]


async def answer(
    generations: Generations, request_id: str, request: steering_pb2.ScoreRequest
) -> steering_pb2.ScoreResponse:
    """What SteeringService.Score returns."""
    served = generations.served
    prompt = await read_prompt(request.prompt, served.engine, "prompt")
    count = len(request.continuations)
    if not 1 <= count <= MAX_CONTINUATIONS:
        raise InvalidRequest(f"{count} texts; 1 to {MAX_CONTINUATIONS}", field="continuations")
    continuations = [
        await read_continuation(message, served.engine, len(prompt), f"continuations[{index}]")
        for index, message in enumerate(request.continuations)
    ]
    # A scope has to hold somewhere in the shortest of them.
    computed = min(map(len, continuations)) + 1
    program = read_program(request, served, len(prompt), "", computed=computed)
    scores = await together(
        score(generations, "Score", f"{request_id}:{index}", prompt, continuation, program)
        for index, continuation in enumerate(continuations)
    )
    tokenizer = served.engine.tokenizer
    return steering_pb2.ScoreResponse(
        prompt=events.prompt_tokens(prompt, tokenizer),
        continuations=[
            steering_pb2.Scored(
                tokens=events.prompt_tokens(continuation, tokenizer),
                logprobs=found.logprobs,
                logprob=sum(found.logprobs),
                edit_reports=events.edit_reports(found.reports),
            )
            for continuation, found in zip(continuations, scores, strict=True)
        ],
        edits=write_edits(program.edits),
    )


async def score(
    generations: Generations,
    rpc: str,
    request_id: str,
    prompt: Sequence[int],
    continuation: Sequence[int],
    program: Program,
) -> Score:
    """The log-probability of each token of `continuation` after the prompt, under the program."""
    sampling = Sampling(max_tokens=1, temperature=0.0, prompt_logprobs=True)
    ids = (*prompt, *continuation)
    request = ResolvedRequest(ids, sampling, program, forced=len(continuation))
    run = generations.begin(rpc, request_id, request)
    logprobs: tuple[float, ...] = ()
    async with aclosing(run.outputs()) as outputs:
        async for output in outputs:
            logprobs += output.prompt_logprobs
            if output.finish:
                return Score(logprobs[-len(continuation) :], output.finish.reports)
    raise EngineUnavailable("the engine ended the scoring without a finish")
