"""ActivationService: the activations of a text."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

import grpc
from steer.v1 import activations_pb2, activations_pb2_grpc

from steer_server.api import events
from steer_server.api.calls import request_id
from steer_server.api.generations import Generations
from steer_server.api.wire import read_encode


class ActivationService(activations_pb2_grpc.ActivationServiceServicer):
    def __init__(self, generations: Generations) -> None:
        self._generations = generations

    async def Encode(
        self, request: activations_pb2.EncodeRequest, context: grpc.aio.ServicerContext
    ) -> AsyncGenerator[activations_pb2.EncodeResponse, None]:
        engine = self._generations.engine
        resolved = read_encode(request, engine, self._generations.registry)
        run = self._generations.begin("Encode", request_id(), resolved)
        tokens = events.prompt_tokens(resolved.prompt_token_ids, engine.tokenizer)
        yield activations_pb2.EncodeResponse(tokens=tokens)
        async with aclosing(run.outputs()) as outputs:
            async for output in outputs:
                for batch in events.batches(output.activations):
                    yield activations_pb2.EncodeResponse(activations=batch)
