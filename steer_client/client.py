"""A client whose calls take Python values and give protos."""

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any, Self

from google.rpc import status_pb2
from steer.v1 import (
    activations_pb2,
    activations_pb2_grpc,
    dictionaries_pb2,
    dictionaries_pb2_grpc,
    edits_pb2,
    prompt_pb2,
    steering_pb2,
    steering_pb2_grpc,
)

from steer_client.channel import Tls, call_metadata, open_channel
from steer_client.errors import CallFailed, calls

DEFAULT_TARGET = "localhost:50051"

GenerationEvent = steering_pb2.Started | steering_pb2.Tokens | steering_pb2.Finished
SessionEvent = GenerationEvent | steering_pb2.UpdateApplied | steering_pb2.UpdateRejected


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

    async def encode(
        self, prompt: str | Sequence[int], read_outs: Sequence[activations_pb2.ReadOut]
    ) -> AsyncGenerator[activations_pb2.EncodeResponse, None]:
        """The prompt's tokens, then their activations."""
        request = activations_pb2.EncodeRequest(prompt=_prompt(prompt), read_outs=read_outs)
        with calls():
            async for response in self._activations.Encode(request, **self._with):
                yield response

    async def generate(
        self,
        prompt: str | Sequence[int],
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
        call = self._steering.GenerateStream(request, **self._with)
        try:
            with calls():
                async for response in call:
                    yield getattr(response, response.WhichOneof("event"))
        finally:
            call.cancel()

    def session(self) -> "LiveSession":
        """A session, to be used in `async with`."""
        return LiveSession(self._steering, self._metadata)


class LiveSession:
    """Turns whose edits change while tokens come: start, update, and iterate over the events."""

    def __init__(
        self,
        steering: steering_pb2_grpc.SteeringServiceStub,
        metadata: Sequence[tuple[str, str]] = (),
    ) -> None:
        self._call = steering.Session(metadata=tuple(metadata))
        self._updates = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._call.cancel()

    async def start(
        self,
        prompt: str | Sequence[int],
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


def rejection(event: steering_pb2.UpdateRejected) -> CallFailed:
    """Why an update was rejected."""
    return CallFailed.from_status(status_pb2.Status.FromString(event.status.SerializeToString()))


def _generation(
    prompt: str | Sequence[int],
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


def _prompt(prompt: str | Sequence[int]) -> prompt_pb2.Prompt:
    if isinstance(prompt, str):
        return prompt_pb2.Prompt(text=prompt)
    return prompt_pb2.Prompt(token_ids=prompt_pb2.TokenIds(ids=prompt))
