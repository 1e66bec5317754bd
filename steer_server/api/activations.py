"""ActivationService: the activations of texts, and of the watched features over all requests."""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress

import grpc
import numpy as np
from numpy.typing import NDArray
from steer.v1 import activations_pb2, activations_pb2_grpc, prompt_pb2

from steer_server.admission import MAX_ROW_BYTES
from steer_server.api import events
from steer_server.api.aggregates import Aggregates, strongest
from steer_server.api.calls import Gate, request_id
from steer_server.api.dictionaries import label_of
from steer_server.api.generations import Generations
from steer_server.api.prompts import read_prompt
from steer_server.api.streams import together
from steer_server.api.watch import Count
from steer_server.api.wire import ResolvedRequest, read_encode
from steer_server.dictionary.files import StoredDictionary
from steer_server.errors import DictionaryMismatch, EngineUnavailable, InvalidRequest
from steer_server.generation import Sampling
from steer_server.program import Program, ReadOut

MAX_PROMPTS = 64
DEFAULT_TOP, MAX_TOP = 20, 1024
_INTERVALS = 0.1, 3600.0
_AGGREGATES: dict[int, str] = {
    activations_pb2.AGGREGATE_UNSPECIFIED: "mean",
    activations_pb2.AGGREGATE_MEAN: "mean",
    activations_pb2.AGGREGATE_MAX: "max",
    activations_pb2.AGGREGATE_SUM: "sum",
    activations_pb2.AGGREGATE_FREQUENCY: "frequency",
}

_Context = grpc.aio.ServicerContext


class ActivationService(activations_pb2_grpc.ActivationServiceServicer):
    def __init__(self, generations: Generations, gate: Gate) -> None:
        self._generations = generations
        self._gate = gate

    async def Encode(
        self, request: activations_pb2.EncodeRequest, context: _Context
    ) -> AsyncGenerator[activations_pb2.EncodeResponse, None]:
        engine = self._generations.engine
        resolved = await read_encode(request, engine, self._generations.registry)
        run = self._generations.begin("Encode", request_id(), resolved)
        tokens = events.prompt_tokens(resolved.prompt_token_ids, engine.tokenizer)
        yield activations_pb2.EncodeResponse(tokens=tokens)
        async with aclosing(run.outputs()) as outputs:
            async for output in outputs:
                for batch in events.batches(output.activations):
                    response = activations_pb2.EncodeResponse()
                    events.write_rows(response.activations, batch)
                    yield response

    async def Inspect(
        self, request: activations_pb2.InspectRequest, context: _Context
    ) -> activations_pb2.InspectResponse:
        self._generations.registry.get(request.dictionary, field="dictionary")
        name = _aggregate(request.aggregate)
        top_k = _top_k(request.top_k)
        sets = {"prompts": await self._prompts(request.prompts, "prompts")}
        # Another one may have its name by now.
        stored = self._generations.registry.get(request.dictionary, field="dictionary")
        (found,) = await self._aggregate(
            "Inspect", sets, request.dictionary, stored, request.include_first
        )
        return activations_pb2.InspectResponse(
            features=_summaries(
                found, strongest(getattr(found, name), found.active, top_k), stored
            ),
            tokens=found.tokens,
        )

    async def Contrast(
        self, request: activations_pb2.ContrastRequest, context: _Context
    ) -> activations_pb2.ContrastResponse:
        self._generations.registry.get(request.dictionary, field="dictionary")
        name = _aggregate(request.aggregate)
        if name == "sum":
            raise InvalidRequest(
                "the sum grows with the texts; choose mean, max or frequency", field="aggregate"
            )
        top_k = _top_k(request.top_k)
        sets = {
            side: await self._prompts(getattr(request, side), side)
            for side in ("positive", "negative")
        }
        # Another one may have its name by now.
        stored = self._generations.registry.get(request.dictionary, field="dictionary")
        positive, negative = await self._aggregate(
            "Contrast", sets, request.dictionary, stored, request.include_first
        )
        sides = getattr(positive, name), getattr(negative, name)
        return activations_pb2.ContrastResponse(
            positive=_contrasts(*sides, 1, top_k, stored),
            negative=_contrasts(*sides, -1, top_k, stored),
            positive_tokens=positive.tokens,
            negative_tokens=negative.tokens,
        )

    async def WatchStats(
        self, request: activations_pb2.WatchStatsRequest, context: _Context
    ) -> AsyncGenerator[activations_pb2.WatchStatsResponse, None]:
        interval = request.interval_seconds if request.HasField("interval_seconds") else 1.0
        low, high = _INTERVALS
        if not low <= interval <= high:
            raise InvalidRequest(
                f"{interval:g} is not in {low:g}..{high:g}", field="interval_seconds"
            )
        with self._generations.watch.tally() as tally:
            yield activations_pb2.WatchStatsResponse(features=self._watched({}))
            before = time.monotonic()
            while True:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._gate.draining.wait(), interval)
                if self._gate.draining.is_set():
                    raise EngineUnavailable("the server is shutting down")
                now = time.monotonic()
                yield activations_pb2.WatchStatsResponse(
                    features=self._watched(tally.take()), seconds=now - before
                )
                before = now

    def _watched(
        self, counts: dict[tuple[str, int], Count]
    ) -> list[activations_pb2.WatchedFeature]:
        found = []
        registry = self._generations.registry
        for name, feature in self._generations.watch:
            # One that is about to be unloaded is not there any more.
            if name in registry:
                count = counts.get((name, feature), Count())
                entry = activations_pb2.WatchedFeature(
                    dictionary=name,
                    feature=feature,
                    label=label_of(registry.get(name), feature),
                    active_tokens=count.tokens,
                    sum=count.total,
                    max=count.largest,
                )
                found.append(entry)
        return found

    async def _prompts(
        self, messages: Sequence[prompt_pb2.Prompt], path: str
    ) -> list[tuple[int, ...]]:
        if not 1 <= len(messages) <= MAX_PROMPTS:
            raise InvalidRequest(f"{len(messages)} texts; 1 to {MAX_PROMPTS}", field=path)
        engine = self._generations.engine
        return [
            await read_prompt(message, engine, f"{path}[{index}]")
            for index, message in enumerate(messages)
        ]

    async def _aggregate(
        self,
        rpc: str,
        sets: dict[str, list[tuple[int, ...]]],
        name: str,
        stored: StoredDictionary,
        include_first: bool,
    ) -> list[Aggregates]:
        """Of each set of prompts; all are in the engine at once."""
        if not stored.dictionary.non_negative:
            raise DictionaryMismatch(
                "its activations may be negative, and only those above 0 are read here; use Encode with named features",
                field="dictionary",
            )
        first = 0 if include_first else 1
        for path, prompts in sets.items():
            if all(len(prompt) <= first for prompt in prompts):
                raise InvalidRequest(
                    "no token is counted: each text is one token at position 0; set include_first",
                    field=path,
                )
        read_out = ReadOut(name, above=0.0, row_bytes=MAX_ROW_BYTES, generated=False)
        found = [Aggregates(stored.card.n_features, first) for _ in sets]
        await together(
            self._add(into, rpc, f"{number}:{index}", prompt, read_out)
            for number, (into, prompts) in enumerate(zip(found, sets.values(), strict=True))
            for index, prompt in enumerate(prompts)
        )
        return found

    async def _add(
        self,
        into: Aggregates,
        rpc: str,
        name: str,
        prompt: tuple[int, ...],
        read_out: ReadOut,
    ) -> None:
        sampling = Sampling(max_tokens=1, temperature=0.0)
        resolved = ResolvedRequest(prompt, sampling, Program(read_outs=(read_out,)))
        run = self._generations.begin(rpc, f"{request_id()}:{name}", resolved)
        async with aclosing(run.outputs()) as outputs:
            async for output in outputs:
                for rows in output.activations:
                    into.add(rows)


def _aggregate(value: int) -> str:
    if value not in _AGGREGATES:
        raise InvalidRequest(
            f"aggregate {value} is not one of mean (1), max (2), sum (3) and frequency (4)",
            field="aggregate",
        )
    return _AGGREGATES[value]


def _top_k(value: int) -> int:
    if value > MAX_TOP:
        raise InvalidRequest(f"{value} is over {MAX_TOP}", field="top_k")
    return value or DEFAULT_TOP


def _summaries(
    found: Aggregates, features: Sequence[int], stored: StoredDictionary
) -> list[activations_pb2.FeatureSummary]:
    mean, largest, frequency = found.mean, found.max, found.frequency
    return [
        activations_pb2.FeatureSummary(
            feature=feature,
            label=label_of(stored, feature),
            mean=mean[feature],
            max=largest[feature],
            sum=found.sum[feature],
            frequency=frequency[feature],
        )
        for feature in features
    ]


def _contrasts(
    positive: NDArray, negative: NDArray, sign: int, top_k: int, stored: StoredDictionary
) -> list[activations_pb2.FeatureContrast]:
    """Features that the side of that sign has more of."""
    difference = positive - negative
    more = sign * difference
    return [
        activations_pb2.FeatureContrast(
            feature=feature,
            label=label_of(stored, feature),
            difference=difference[feature],
            positive=positive[feature],
            negative=negative[feature],
        )
        for feature in strongest(more, np.flatnonzero(more > 0), top_k)
    ]
