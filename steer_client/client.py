"""A client whose calls take Python values and give protos."""

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any, Literal, Self

import grpc
from google.rpc import status_pb2
from steer.v1 import (
    activations_pb2,
    activations_pb2_grpc,
    dictionaries_pb2,
    dictionaries_pb2_grpc,
    edits_pb2,
    info_pb2,
    info_pb2_grpc,
    prompt_pb2,
    steering_pb2,
    steering_pb2_grpc,
)

from steer_client.admin import AdminClient
from steer_client.errors import CallFailed, calls

DEFAULT_TARGET = "localhost:50051"

Prompt = str | Sequence[int]
"""Text, or token ids."""
Aggregate = Literal["mean", "max", "sum", "frequency"]

GenerationEvent = steering_pb2.Started | steering_pb2.Tokens | steering_pb2.Finished
SessionEvent = GenerationEvent | steering_pb2.UpdateApplied | steering_pb2.UpdateRejected

_OPTIONS = (
    ("grpc.max_receive_message_length", 16 << 20),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
)


class SteerClient:
    """Calls a steer server; use it in `async with`. A failed call raises CallFailed."""

    def __init__(self, target: str = DEFAULT_TARGET, *, timeout: float | None = None) -> None:
        """`timeout` in seconds holds for each call but a session's."""
        self._channel = grpc.aio.insecure_channel(target, options=_OPTIONS)
        self._timeout = timeout
        self._steering = steering_pb2_grpc.SteeringServiceStub(self._channel)
        self._activations = activations_pb2_grpc.ActivationServiceStub(self._channel)
        self._dictionaries = dictionaries_pb2_grpc.DictionaryServiceStub(self._channel)
        self._info = info_pb2_grpc.ServerInfoServiceStub(self._channel)
        self.admin = AdminClient(self._channel, timeout)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._channel.close()

    async def dictionaries(self) -> list[dictionaries_pb2.Dictionary]:
        """The resident dictionaries, by name."""
        with calls():
            request = dictionaries_pb2.ListDictionariesRequest()
            response = await self._dictionaries.ListDictionaries(request, timeout=self._timeout)
        return list(response.dictionaries)

    async def feature(self, feature: tuple[str, int]) -> dictionaries_pb2.Feature:
        """What is known of a feature."""
        request = dictionaries_pb2.GetFeatureRequest(dictionary=feature[0], feature=feature[1])
        with calls():
            return (await self._dictionaries.GetFeature(request, timeout=self._timeout)).feature

    async def info(self) -> info_pb2.GetServerInfoResponse:
        """What the server is and can do."""
        request = info_pb2.GetServerInfoRequest()
        with calls():
            return await self._info.GetServerInfo(request, timeout=self._timeout)

    async def dictionary(self, name: str) -> dictionaries_pb2.Dictionary:
        """One resident dictionary."""
        request = dictionaries_pb2.GetDictionaryRequest(dictionary=name)
        with calls():
            response = await self._dictionaries.GetDictionary(request, timeout=self._timeout)
        return response.dictionary

    async def features(
        self, dictionary: str, features: Sequence[int]
    ) -> list[dictionaries_pb2.Feature]:
        """What is known of up to 256 features, in their order."""
        request = dictionaries_pb2.BatchGetFeaturesRequest(dictionary=dictionary, features=features)
        with calls():
            response = await self._dictionaries.BatchGetFeatures(request, timeout=self._timeout)
        return list(response.features)

    async def search(
        self, query: str, *, dictionary: str = "", evidence: bool = False, page_size: int = 0
    ) -> AsyncGenerator[dictionaries_pb2.FeatureMatch, None]:
        """Features whose label has the words, best first; `evidence` looks at their tokens, too.

        Pages are fetched as they are needed.
        """
        request = dictionaries_pb2.SearchFeaturesRequest(
            query=query, dictionary=dictionary, page_size=page_size
        )
        if evidence:
            request.search_in = dictionaries_pb2.SEARCH_IN_EVIDENCE
        while True:
            with calls():
                page = await self._dictionaries.SearchFeatures(request, timeout=self._timeout)
            for match in page.matches:
                yield match
            request.page_token = page.next_page_token
            if not page.next_page_token:
                return

    async def nearest(
        self, feature: tuple[str, int], *, among: str = "", top_k: int = 0
    ) -> list[dictionaries_pb2.FeatureMatch]:
        """Features whose decoder rows point the way of this one's, by default of its own dictionary."""
        request = dictionaries_pb2.NearestFeaturesRequest(
            dictionary=feature[0], feature=feature[1], among=among, top_k=top_k
        )
        with calls():
            response = await self._dictionaries.NearestFeatures(request, timeout=self._timeout)
        return list(response.matches)

    async def inspect(
        self,
        prompts: Sequence[Prompt],
        dictionary: str,
        *,
        aggregate: Aggregate = "mean",
        top_k: int = 0,
        include_first: bool = False,
    ) -> activations_pb2.InspectResponse:
        """The features that the texts have most of."""
        request = activations_pb2.InspectRequest(
            prompts=map(_prompt, prompts),
            dictionary=dictionary,
            aggregate=_AGGREGATES[aggregate],
            top_k=top_k,
            include_first=include_first,
        )
        with calls():
            return await self._activations.Inspect(request, timeout=self._timeout)

    async def contrast(
        self,
        positive: Sequence[Prompt],
        negative: Sequence[Prompt],
        dictionary: str,
        *,
        aggregate: Aggregate = "mean",
        top_k: int = 0,
        include_first: bool = False,
    ) -> activations_pb2.ContrastResponse:
        """The features that one set of texts has more of than the other."""
        request = activations_pb2.ContrastRequest(
            positive=map(_prompt, positive),
            negative=map(_prompt, negative),
            dictionary=dictionary,
            aggregate=_AGGREGATES[aggregate],
            top_k=top_k,
            include_first=include_first,
        )
        with calls():
            return await self._activations.Contrast(request, timeout=self._timeout)

    async def watch_stats(
        self, interval_seconds: float = 1.0
    ) -> AsyncGenerator[activations_pb2.WatchStatsResponse, None]:
        """How the watched features do, every so often, until it is closed."""
        request = activations_pb2.WatchStatsRequest(interval_seconds=interval_seconds)
        call = self._activations.WatchStats(request)
        try:
            with calls():
                async for response in call:
                    yield response
        finally:
            call.cancel()

    async def encode(
        self, prompt: Prompt, read_outs: Sequence[activations_pb2.ReadOut]
    ) -> AsyncGenerator[activations_pb2.EncodeResponse, None]:
        """The prompt's tokens, then their activations."""
        request = activations_pb2.EncodeRequest(prompt=_prompt(prompt), read_outs=read_outs)
        with calls():
            async for response in self._activations.Encode(request, timeout=self._timeout):
                yield response

    async def generate(
        self,
        prompt: Prompt,
        *,
        edits: Sequence[edits_pb2.Edit] = (),
        read_outs: Sequence[activations_pb2.ReadOut] = (),
        **sampling: Any,
    ) -> AsyncGenerator[GenerationEvent, None]:
        """Started, Tokens as they come, Finished; `sampling` takes the fields of steer.v1.Sampling.

        Closing the generator aborts the generation.
        """
        generation = _generation(prompt, edits, read_outs, sampling)
        request = steering_pb2.GenerateStreamRequest(generation=generation)
        call = self._steering.GenerateStream(request, timeout=self._timeout)
        try:
            with calls():
                async for response in call:
                    yield getattr(response, response.WhichOneof("event"))
        finally:
            call.cancel()

    def session(self) -> "LiveSession":
        """A session, to be used in `async with`."""
        return LiveSession(self._steering)


class LiveSession:
    """Turns whose edits change while tokens come: start, update, and iterate over the events."""

    def __init__(self, steering: steering_pb2_grpc.SteeringServiceStub) -> None:
        self._call = steering.Session()
        self._updates = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._call.cancel()

    async def start(
        self,
        prompt: Prompt,
        *,
        edits: Sequence[edits_pb2.Edit] = (),
        read_outs: Sequence[activations_pb2.ReadOut] = (),
        **sampling: Any,
    ) -> None:
        """Begins a turn; only one runs at a time."""
        generation = _generation(prompt, edits, read_outs, sampling)
        start = steering_pb2.StartTurn(generation=generation)
        await self._send(steering_pb2.SessionRequest(start_turn=start))

    async def update(self, edits: Sequence[edits_pb2.Edit]) -> int:
        """Replaces all edits of the turn; returns the update_id that the answer will have."""
        self._updates += 1
        update = steering_pb2.UpdateEdits(edits=edits, update_id=self._updates)
        await self._send(steering_pb2.SessionRequest(update=update))
        return self._updates

    async def cancel_turn(self) -> None:
        """Aborts the turn; its Finished follows."""
        cancel = steering_pb2.CancelTurn()
        await self._send(steering_pb2.SessionRequest(cancel_turn=cancel))

    async def half_close(self) -> None:
        """No more commands; the turn that runs goes on to its end."""
        with calls():
            await self._call.done_writing()

    async def __aiter__(self) -> AsyncIterator[SessionEvent]:
        with calls():
            async for response in self._call:
                yield getattr(response, response.WhichOneof("event"))

    async def _send(self, request: steering_pb2.SessionRequest) -> None:
        with calls():
            await self._call.write(request)


_AGGREGATES: dict[Aggregate, activations_pb2.Aggregate] = {
    "mean": activations_pb2.AGGREGATE_MEAN,
    "max": activations_pb2.AGGREGATE_MAX,
    "sum": activations_pb2.AGGREGATE_SUM,
    "frequency": activations_pb2.AGGREGATE_FREQUENCY,
}


def rejection(event: steering_pb2.UpdateRejected) -> CallFailed:
    """Why an update was rejected."""
    return CallFailed.from_status(status_pb2.Status.FromString(event.status.SerializeToString()))


def _generation(
    prompt: Prompt,
    edits: Sequence[edits_pb2.Edit],
    read_outs: Sequence[activations_pb2.ReadOut],
    sampling: dict[str, Any],
) -> steering_pb2.Generation:
    return steering_pb2.Generation(
        prompt=_prompt(prompt),
        sampling=steering_pb2.Sampling(**sampling),
        edits=edits,
        read_outs=read_outs,
    )


def _prompt(prompt: Prompt) -> prompt_pb2.Prompt:
    if isinstance(prompt, str):
        return prompt_pb2.Prompt(text=prompt)
    return prompt_pb2.Prompt(token_ids=prompt_pb2.TokenIds(ids=prompt))
