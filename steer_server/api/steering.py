"""SteeringService: generations under edits."""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

import grpc
from steer.v1 import steering_pb2, steering_pb2_grpc

from steer_server.api import events
from steer_server.api.calls import Gate, request_id
from steer_server.api.generations import Generations
from steer_server.api.session import Session
from steer_server.api.sessions import Sessions
from steer_server.api.wire import read_generation
from steer_server.errors import InvalidRequest

_Context = grpc.aio.ServicerContext


class SteeringService(steering_pb2_grpc.SteeringServiceServicer):
    def __init__(self, generations: Generations, gate: Gate, sessions: Sessions) -> None:
        self._generations = generations
        self._gate = gate
        self._sessions = sessions

    async def GenerateStream(
        self, request: steering_pb2.GenerateStreamRequest, context: _Context
    ) -> AsyncGenerator[steering_pb2.GenerateStreamResponse, None]:
        engine, registry = self._generations.engine, self._generations.registry
        if not request.HasField("generation"):
            raise InvalidRequest("required", field="generation")
        resolved = read_generation(request.generation, engine, registry, "generation")
        run = self._generations.begin("GenerateStream", request_id(), resolved)
        started = events.started(run.request_id, resolved, engine.tokenizer)
        yield steering_pb2.GenerateStreamResponse(started=started)
        async with aclosing(run.outputs()) as outputs:
            async for output in outputs:
                for tokens in events.tokens(output):
                    yield steering_pb2.GenerateStreamResponse(tokens=tokens)
                if output.finish:
                    finished = events.finished(output.finish)
                    yield steering_pb2.GenerateStreamResponse(finished=finished)

    async def Session(
        self,
        request_iterator: AsyncIterator[steering_pb2.SessionRequest],
        context: _Context,
    ) -> AsyncGenerator[steering_pb2.SessionResponse, None]:
        with self._sessions.enter(request_id()) as entry:
            session = Session(self._generations, self._gate, entry)
            async with aclosing(session.run(request_iterator)) as responses:
                async for response in responses:
                    yield response
