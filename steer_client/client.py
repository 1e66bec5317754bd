"""A client whose calls take Python values and give protos."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Literal, Self, Unpack

from steer.v1 import (
    activations_pb2,
    activations_pb2_grpc,
    dictionaries_pb2,
    dictionaries_pb2_grpc,
    edits_pb2,
    info_pb2,
    info_pb2_grpc,
    steering_pb2,
    steering_pb2_grpc,
)

from steer_client.admin import AdminClient
from steer_client.channel import Tls, call_metadata, open_channel
from steer_client.errors import calls
from steer_client.generation import Options, PromptLike, as_prompt, continuation, generation
from steer_client.live import LiveSession

DEFAULT_TARGET = "localhost:50051"

Aggregate = Literal["mean", "max", "sum", "frequency"]

GenerationEvent = steering_pb2.Started | steering_pb2.Tokens | steering_pb2.Finished

_AGGREGATES: dict[Aggregate, activations_pb2.Aggregate] = {
    "mean": activations_pb2.AGGREGATE_MEAN,
    "max": activations_pb2.AGGREGATE_MAX,
    "sum": activations_pb2.AGGREGATE_SUM,
    "frequency": activations_pb2.AGGREGATE_FREQUENCY,
}


class SteerClient:
    """Calls a steer server; use it in `async with`. A failed call raises CallFailed."""

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        timeout: float | None = None,
        tls: Tls | None = None,
        token: str | None = None,
    ) -> None:
        """`timeout` in seconds holds for each call but a session's.

        `token` is sent over TLS or to this machine only; ValueError otherwise.
        """
        self._metadata = call_metadata(token)
        self._channel = open_channel(target, tls, token)
        self._with: dict[str, Any] = {"timeout": timeout, "metadata": self._metadata}
        self._steering = steering_pb2_grpc.SteeringServiceStub(self._channel)
        self._activations = activations_pb2_grpc.ActivationServiceStub(self._channel)
        self._dictionaries = dictionaries_pb2_grpc.DictionaryServiceStub(self._channel)
        self._info = info_pb2_grpc.ServerInfoServiceStub(self._channel)
        self.admin = AdminClient(self._channel, self._with)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._channel.close()

    async def dictionaries(self) -> list[dictionaries_pb2.Dictionary]:
        """The resident dictionaries, by name."""
        with calls():
            request = dictionaries_pb2.ListDictionariesRequest()
            response = await self._dictionaries.ListDictionaries(request, **self._with)
        return list(response.dictionaries)

    async def feature(self, feature: tuple[str, int]) -> dictionaries_pb2.Feature:
        """What is known of a feature."""
        request = dictionaries_pb2.GetFeatureRequest(dictionary=feature[0], feature=feature[1])
        with calls():
            return (await self._dictionaries.GetFeature(request, **self._with)).feature

    async def info(self) -> info_pb2.GetServerInfoResponse:
        """What the server is and can do."""
        request = info_pb2.GetServerInfoRequest()
        with calls():
            return await self._info.GetServerInfo(request, **self._with)

    async def dictionary(self, name: str) -> dictionaries_pb2.Dictionary:
        """One resident dictionary."""
        request = dictionaries_pb2.GetDictionaryRequest(dictionary=name)
        with calls():
            response = await self._dictionaries.GetDictionary(request, **self._with)
        return response.dictionary

    async def features(
        self, dictionary: str, features: Sequence[int]
    ) -> list[dictionaries_pb2.Feature]:
        """What is known of up to 256 features, in their order."""
        request = dictionaries_pb2.BatchGetFeaturesRequest(dictionary=dictionary, features=features)
        with calls():
            response = await self._dictionaries.BatchGetFeatures(request, **self._with)
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
                page = await self._dictionaries.SearchFeatures(request, **self._with)
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
            response = await self._dictionaries.NearestFeatures(request, **self._with)
        return list(response.matches)

    async def inspect(
        self,
        prompts: Sequence[PromptLike],
        dictionary: str,
        *,
        aggregate: Aggregate = "mean",
        top_k: int = 0,
        include_first: bool = False,
    ) -> activations_pb2.InspectResponse:
        """The features that the texts have most of."""
        request = activations_pb2.InspectRequest(
            prompts=map(as_prompt, prompts),
            dictionary=dictionary,
            aggregate=_AGGREGATES[aggregate],
            top_k=top_k,
            include_first=include_first,
        )
        with calls():
            return await self._activations.Inspect(request, **self._with)

    async def contrast(
        self,
        positive: Sequence[PromptLike],
        negative: Sequence[PromptLike],
        dictionary: str,
        *,
        aggregate: Aggregate = "mean",
        top_k: int = 0,
        include_first: bool = False,
    ) -> activations_pb2.ContrastResponse:
        """The features that one set of texts has more of than the other."""
        request = activations_pb2.ContrastRequest(
            positive=map(as_prompt, positive),
            negative=map(as_prompt, negative),
            dictionary=dictionary,
            aggregate=_AGGREGATES[aggregate],
            top_k=top_k,
            include_first=include_first,
        )
        with calls():
            return await self._activations.Contrast(request, **self._with)

    async def watch_stats(
        self, interval_seconds: float = 1.0
    ) -> AsyncGenerator[activations_pb2.WatchStatsResponse, None]:
        """How the watched features do, every so often, until it is closed."""
        request = activations_pb2.WatchStatsRequest(interval_seconds=interval_seconds)
        call = self._activations.WatchStats(request, metadata=self._metadata)
        try:
            with calls():
                async for response in call:
                    yield response
        finally:
            call.cancel()

    async def encode(
        self, prompt: PromptLike, read_outs: Sequence[activations_pb2.ReadOut]
    ) -> AsyncGenerator[activations_pb2.EncodeResponse, None]:
        """The prompt's tokens, then their activations."""
        request = activations_pb2.EncodeRequest(prompt=as_prompt(prompt), read_outs=read_outs)
        with calls():
            async for response in self._activations.Encode(request, **self._with):
                yield response

    async def complete(
        self, prompt: PromptLike, **options: Unpack[Options]
    ) -> steering_pb2.GenerateResponse:
        """A whole generation at once; see `Options`."""
        request = steering_pb2.GenerateRequest(generation=generation(prompt, options))
        with calls():
            return await self._steering.Generate(request, **self._with)

    async def generate(
        self, prompt: PromptLike, **options: Unpack[Options]
    ) -> AsyncGenerator[GenerationEvent, None]:
        """Started, Tokens as they come, Finished (one for each sequence); see `Options`.

        Closing the generator aborts the generation.
        """
        request = steering_pb2.GenerateStreamRequest(generation=generation(prompt, options))
        call = self._steering.GenerateStream(request, **self._with)
        try:
            with calls():
                async for response in call:
                    yield getattr(response, response.WhichOneof("event"))
        finally:
            call.cancel()

    async def compare(
        self,
        prompt: PromptLike,
        arms: Sequence[Sequence[edits_pb2.Edit] | steering_pb2.Arm],
        **options: Unpack[Options],
    ) -> AsyncGenerator[steering_pb2.CompareResponse, None]:
        """Generations side by side: under the options' edits (by default none), and under those of each arm."""
        request = steering_pb2.CompareRequest(
            generation=generation(prompt, options),
            arms=[
                arm if isinstance(arm, steering_pb2.Arm) else steering_pb2.Arm(edits=arm)
                for arm in arms
            ],
        )
        call = self._steering.Compare(request, **self._with)
        try:
            with calls():
                async for response in call:
                    yield response
        finally:
            call.cancel()

    async def score(
        self,
        prompt: PromptLike,
        continuations: Sequence[str | Sequence[int]],
        edits: Sequence[edits_pb2.Edit] = (),
        presets: Sequence[str] = (),
    ) -> steering_pb2.ScoreResponse:
        """How likely the model finds each continuation after the prompt, under the edits."""
        request = steering_pb2.ScoreRequest(
            prompt=as_prompt(prompt),
            continuations=[continuation(entry) for entry in continuations],
            edits=edits,
            presets=presets,
        )
        with calls():
            return await self._steering.Score(request, **self._with)

    async def patch(
        self,
        source: PromptLike,
        target: PromptLike,
        dictionary: str,
        sets: Sequence[Sequence[int]] = (),
        *,
        positions: Mapping[int, int] | None = None,
        all_features: bool = False,
        token_ids: Sequence[int] = (),
        top_k: int | None = None,
    ) -> steering_pb2.PatchResponse:
        """The target run with the source's activations of each set of features.

        `positions` maps target positions to source positions; by default each but 0 to itself.
        """
        request = steering_pb2.PatchRequest(
            source=as_prompt(source),
            target=as_prompt(target),
            dictionary=dictionary,
            sets=[steering_pb2.FeatureSet(features=features) for features in sets],
            positions=[
                steering_pb2.PositionPair(source=there, target=here)
                for here, there in (positions or {}).items()
            ],
            all_features=all_features,
            token_ids=token_ids,
            top_k=top_k,
        )
        with calls():
            return await self._steering.Patch(request, **self._with)

    def session(self) -> LiveSession:
        """A session, to be used in `async with`."""
        return LiveSession(self._steering, self._metadata)
