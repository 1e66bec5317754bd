"""SteeringService: generations under edits."""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

import grpc
from steer.v1 import steering_pb2, steering_pb2_grpc

from steer_server.api import compare, events, patching, scores
from steer_server.api.calls import Gate, principal, request_id
from steer_server.api.generations import Generations
from steer_server.api.session import Session, SessionLimits
from steer_server.api.sessions import Sessions
from steer_server.api.streams import merged
from steer_server.api.wire import read_generation
from steer_server.errors import InvalidRequest

_Context = grpc.aio.ServicerContext
_Event = steering_pb2.Started | steering_pb2.Tokens | steering_pb2.Finished


class SteeringService(steering_pb2_grpc.SteeringServiceServicer):
    def __init__(
        self,
        generations: Generations,
        gate: Gate,
        sessions: Sessions,
        limits: SessionLimits,
    ) -> None:
        self._generations = generations
        self._gate = gate
        self._sessions = sessions
        self._limits = limits

    async def Generate(
        self, request: steering_pb2.GenerateRequest, context: _Context
    ) -> steering_pb2.GenerateResponse:
        response = steering_pb2.GenerateResponse()
        async with aclosing(self._events("Generate", request)) as found:
            async for event in found:
                match event:
                    case steering_pb2.Started():
                        response.started.CopyFrom(event)
                        n = event.sampling.n
                        response.sequences.extend(steering_pb2.Sequence() for _ in range(n))
                    case steering_pb2.Tokens():
                        _append(response.sequences[event.sequence].tokens, event)
                    case steering_pb2.Finished():
                        response.sequences[event.sequence].finished.CopyFrom(event)
        return response

    async def GenerateStream(
        self, request: steering_pb2.GenerateStreamRequest, context: _Context
    ) -> AsyncGenerator[steering_pb2.GenerateStreamResponse, None]:
        async with aclosing(self._events("GenerateStream", request)) as found:
            async for event in found:
                response = steering_pb2.GenerateStreamResponse()
                getattr(response, _FIELDS[type(event)]).CopyFrom(event)
                yield response

    async def Session(
        self,
        request_iterator: AsyncIterator[steering_pb2.SessionRequest],
        context: _Context,
    ) -> AsyncGenerator[steering_pb2.SessionResponse, None]:
        with self._sessions.enter(request_id(), principal().name) as entry:
            session = Session(self._generations, self._gate, entry, self._limits)
            async with aclosing(session.run(request_iterator)) as responses:
                async for response in responses:
                    yield response

    async def Compare(
        self, request: steering_pb2.CompareRequest, context: _Context
    ) -> AsyncGenerator[steering_pb2.CompareResponse, None]:
        found = compare.responses(self._generations, request_id(), request)
        async with aclosing(found) as responses:
            async for response in responses:
                yield response

    async def Score(
        self, request: steering_pb2.ScoreRequest, context: _Context
    ) -> steering_pb2.ScoreResponse:
        return await scores.answer(self._generations, request_id(), request)

    async def Patch(
        self, request: steering_pb2.PatchRequest, context: _Context
    ) -> steering_pb2.PatchResponse:
        return await patching.answer(self._generations, request_id(), request)

    async def _events(
        self, rpc: str, request: steering_pb2.GenerateRequest | steering_pb2.GenerateStreamRequest
    ) -> AsyncGenerator[_Event, None]:
        """Started, the sequences' tokens as they come, and the end of each."""
        if not request.HasField("generation"):
            raise InvalidRequest("required", field="generation")
        served = self._generations.served
        resolved = read_generation(request.generation, served, "generation", many=True)
        runs = self._generations.begin_all(rpc, request_id(), resolved)
        yield events.started(request_id(), resolved, served.engine.tokenizer)
        async with aclosing(merged([run.outputs() for run in runs])) as outputs:
            async for number, output in outputs:
                for tokens in events.tokens(output, runs[number].revision, number):
                    yield tokens
                if output.finish:
                    yield events.finished(output.finish, number)


_FIELDS = {
    steering_pb2.Started: "started",
    steering_pb2.Tokens: "tokens",
    steering_pb2.Finished: "finished",
}


def _append(whole: steering_pb2.Tokens, part: steering_pb2.Tokens) -> None:
    # Merging appends lists and replaces single values.
    text = whole.text + part.text
    whole.MergeFrom(part)
    whole.text, whole.first_index = text, 0
