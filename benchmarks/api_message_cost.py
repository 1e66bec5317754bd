"""What our API adds to a streamed token: microseconds of the server process's CPU, without an engine.

The real gRPC server streams from an engine that gives a token of each stream every millisecond, so that every message
goes out by itself, as with a model; the client, in a process of its own, reads bytes. `grpc` is a bare grpc.aio service
that yields one finished message again and again: what gRPC itself takes, and what the others take beyond it is ours.
`stream` is GenerateStream, `readout` the same with the 32 strongest features of each token, `session` a turn of a
session. CPU time of the process counts all its threads, and not the client; a round runs each arm once, in changing
order, and the result is the median over rounds.

    python benchmarks/api_message_cost.py --json build/api_message_cost.json

`--quick` takes two short rounds, to see that it runs.
"""

import argparse
import asyncio
import contextlib
import multiprocessing
import statistics
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from importlib.metadata import version
from multiprocessing.connection import Connection
from typing import Any

import grpc
import numpy as np
import uvloop
from common import circumstances, parser, publish
from steer.v1 import activations_pb2, prompt_pb2, steering_pb2
from tqdm import tqdm

from steer_server.api.generations import Generations
from steer_server.api.server import Server
from steer_server.dictionary.files import load
from steer_server.generation import (
    ActivationRows,
    Finish,
    FinishReason,
    Generation,
    SlotLoad,
    StepOutput,
)
from steer_server.metrics import Metrics
from steer_server.registry import Registry

PROMPT, TOP, PAUSE = (1, 2, 3, 4, 5, 6, 7, 8), 32, 0.001
GRPC, STREAM, READOUT, SESSION = "grpc", "stream", "readout", "session"
ARMS = (GRPC, STREAM, READOUT, SESSION)
METHODS = {
    GRPC: "/bare/Stream",
    STREAM: "/steer.v1.SteeringService/GenerateStream",
    READOUT: "/steer.v1.SteeringService/GenerateStream",
    SESSION: "/steer.v1.SteeringService/Session",
}
DICTIONARY = "examples/dictionaries/smollm2-135m-resid10"


class Words:
    """A tokenizer that knows one word."""

    vocab_size = 49_152

    def pieces(self, token_ids: Sequence[int]) -> list[str]:
        return [" word"] * len(token_ids)


class PacedEngine:
    """As far as a generation goes: gives a token every `PAUSE` seconds."""

    model_id = "none"
    max_model_len = 1 << 20
    max_num_seqs = 64
    d_model = 576
    self_test_passed = True
    alive = True
    slot_load = SlotLoad({}, 0, 0)
    tokenizer = Words()

    async def generate(self, generation: Generation) -> AsyncIterator[StepOutput]:
        count, features = generation.sampling.max_tokens, np.arange(TOP, dtype=np.uint32)
        values = np.linspace(9, 1, TOP, dtype=np.float32)
        splits, active = np.array([0, TOP], np.uint32), np.array([50], np.uint32)
        for index in range(count):
            rows = ()
            if generation.program.read_outs:
                at = np.array([len(PROMPT) + index], np.uint32)
                rows = (ActivationRows(0, "d", at, splits, features, values, active),)
            finish = None
            if index == count - 1:
                finish = Finish(FinishReason.LENGTH, len(PROMPT), count, 0, ())
            await asyncio.sleep(PAUSE)
            yield StepOutput(index, (index,), " word", activations=rows, finish=finish)


@contextlib.asynccontextmanager
async def steer_server() -> AsyncIterator[str]:
    """Its address."""
    registry = Registry()
    registry.add("d", load(DICTIONARY))
    metrics = Metrics("none", registry, {})
    server = Server(metrics)
    port = server.bind("127.0.0.1", 0)
    await server.start(Generations(PacedEngine(), registry, metrics, {}))
    await server.open()
    yield f"127.0.0.1:{port}"
    await server.stop()


@contextlib.asynccontextmanager
async def bare_server() -> AsyncIterator[str]:
    """The address of one that answers with as many messages as the length of the request says."""
    tokens = steering_pb2.Tokens(first_index=1000, ids=[1000], text=" word")
    message = steering_pb2.GenerateStreamResponse(tokens=tokens)

    async def stream(request: bytes, context: object) -> AsyncIterator[Any]:
        for _ in range(int(request)):
            await asyncio.sleep(PAUSE)
            yield message

    handler = grpc.unary_stream_rpc_method_handler(
        stream, response_serializer=type(message).SerializeToString
    )
    server = grpc.aio.server()
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler("bare", {"Stream": handler})]
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(0)


def request(arm: str, tokens: int) -> bytes:
    """For so many tokens."""
    if arm == GRPC:
        return str(tokens).encode()
    generation = steering_pb2.Generation(
        prompt=prompt_pb2.Prompt(token_ids=prompt_pb2.TokenIds(ids=PROMPT)),
        sampling=steering_pb2.Sampling(max_tokens=tokens),
    )
    if arm == READOUT:
        generation.read_outs.append(activations_pb2.ReadOut(dictionary="d", top_k=TOP))
    if arm == SESSION:
        start = steering_pb2.StartTurn(generation=generation)
        return steering_pb2.SessionRequest(start_turn=start).SerializeToString()
    return steering_pb2.GenerateStreamRequest(generation=generation).SerializeToString()


def client(pipe: Connection, targets: Mapping[str, str]) -> None:
    """In its own process: makes one call for each (arm, tokens, streams) that comes, and answers with the messages it got."""

    async def one(channel: grpc.aio.Channel, arm: str, tokens: int) -> int:
        body = request(arm, tokens)
        if arm == SESSION:
            call = channel.stream_stream(METHODS[arm])(iter([body]))
        else:
            call = channel.unary_stream(METHODS[arm])(body)
        return len([response async for response in call])

    async def serve() -> None:
        channels = {arm: grpc.aio.insecure_channel(target) for arm, target in targets.items()}
        while job := await asyncio.to_thread(pipe.recv):
            arm, tokens, streams = job
            calls = (one(channels[arm], arm, tokens) for _ in range(streams))
            pipe.send(sum(await asyncio.gather(*calls)))

    asyncio.run(serve())


async def measured(pipe: Connection, options: argparse.Namespace) -> list[dict[str, Any]]:
    rounds, tokens = (2, 200) if options.quick else (options.rounds, 1000)
    found = []
    for streams in (1, 8):
        cost: dict[str, list[float]] = {arm: [] for arm in ARMS}
        for number in tqdm(range(-1, rounds), desc=f"{streams} streams", unit="round"):
            turn = number % len(ARMS)
            for arm in ARMS[turn:] + ARMS[:turn]:
                began = time.process_time()
                pipe.send((arm, tokens // streams, streams))
                messages = await asyncio.to_thread(pipe.recv)
                seconds = time.process_time() - began
                if messages < tokens // streams * streams:
                    raise RuntimeError(f"{arm} gave {messages} messages for {tokens} tokens")
                # The first round warms up.
                if number >= 0:
                    cost[arm].append(1e6 * seconds / messages)
        medians = {arm: round(statistics.median(values), 1) for arm, values in cost.items()}
        spread = {arm: [round(min(v), 1), round(max(v), 1)] for arm, v in cost.items()}
        found.append({"streams": streams, "us_per_message": medians, "spread": spread})
    return found


async def main(options: argparse.Namespace) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    async with steer_server() as ours, bare_server() as bare:
        pipe, end = context.Pipe()
        targets = {arm: bare if arm == GRPC else ours for arm in ARMS}
        process = context.Process(target=client, args=(end, targets))
        process.start()
        try:
            loads = await measured(pipe, options)
        finally:
            pipe.send(None)
            process.join(10)
    packages = ("grpcio", "protobuf")
    return {
        **circumstances(options, {name: version(name) for name in packages}),
        "rounds": 2 if options.quick else options.rounds,
        "loads": loads,
    }


if __name__ == "__main__":
    chosen = parser(__doc__, rounds=9).parse_args()
    publish(chosen, uvloop.run(main(chosen)))
