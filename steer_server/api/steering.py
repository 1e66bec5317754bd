"""SteeringService: generations under edits."""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

import grpc
from steer.v1 import steering_pb2, steering_pb2_grpc

from steer_server.api import calls, compare, events, patching, scores
from steer_server.api.calls import Gate, principal, request_id
from steer_server.api.generations import Generations
from steer_server.api.session import Session, SessionLimits
from steer_server.api.sessions import Sessions
from steer_server.api.streams import merged
from steer_server.api.wire import read_generation
from steer_server.errors import InvalidRequest

_Context = grpc.aio.ServicerContext
_Event = steering_pb2.GenerateStreamResponse


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
        response, size = steering_pb2.GenerateResponse(), 0
        async with aclosing(self._events("Generate", request)) as found:
            async for event in found:
                # Not only once all of it has been computed; merged, events take less.
                size += event.ByteSize()
                if size > calls.MAX_RESPONSE_BYTES:
                    size = response.ByteSize() + event.ByteSize()
                    calls.check_size(size)
                match event.WhichOneof("event"):
                    case "started":
                        response.started.CopyFrom(event.started)
                        n = event.started.sampling.n
                        response.sequences.extend(steering_pb2.Sequence() for _ in range(n))
                    case "tokens":
                        _append(response.sequences[event.tokens.sequence].tokens, event.tokens)
                    case "finished":
                        sequence = response.sequences[event.finished.sequence]
                        sequence.finished.CopyFrom(event.finished)
        return response

    async def GenerateStream(
        self, request: steering_pb2.GenerateStreamRequest, context: _Context
    ) -> AsyncGenerator[_Event, None]:
        async with aclosing(self._events("GenerateStream", request)) as found:
            async for event in found:
                yield event

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
        resolved = await read_generation(request.generation, served, "generation", many=True)
        runs = self._generations.begin_all(rpc, request_id(), resolved)
        yield _Event(started=events.started(request_id(), resolved, served.engine.tokenizer))
        async with aclosing(merged([run.outputs() for run in runs])) as outputs:
            async for number, output in outputs:
                for event in events.tokens(_Event, output, runs[number].revision, number):
                    yield event
                if output.finish:
                    yield _Event(finished=events.finished(output.finish, number))


def _append(whole: steering_pb2.Tokens, part: steering_pb2.Tokens) -> None:
    # Merging appends lists and replaces single values.
    text = whole.text + part.text
    whole.MergeFrom(part)
    whole.text, whole.first_index = text, 0
