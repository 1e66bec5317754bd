"""A session: turns whose edits change while tokens come."""

from collections.abc import AsyncIterator, Sequence
from typing import Self, Unpack

from google.rpc import status_pb2
from steer.v1 import activations_pb2, edits_pb2, steering_pb2, steering_pb2_grpc

from steer_client.errors import CallFailed, calls
from steer_client.generation import Options, PromptLike, generation

SessionEvent = (
    steering_pb2.Started
    | steering_pb2.Tokens
    | steering_pb2.Finished
    | steering_pb2.UpdateApplied
    | steering_pb2.UpdateRejected
    | steering_pb2.Paused
    | steering_pb2.Resumed
    | steering_pb2.Draining
)


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

    async def start(self, prompt: PromptLike, **options: Unpack[Options]) -> None:
        """Begins a turn; only one runs at a time."""
        start = steering_pb2.StartTurn(generation=generation(prompt, options))
        await self._send(steering_pb2.SessionRequest(start_turn=start))

    async def update(
        self,
        edits: Sequence[edits_pb2.Edit],
        *,
        read_outs: Sequence[activations_pb2.ReadOut] | None = None,
        at_index: int | None = None,
        presets: Sequence[str] = (),
        size_limit: edits_pb2.SizeLimit | None = None,
    ) -> int:
        """Replaces all edits of the turn; returns the update_id that the answer will have.

        Read-outs stay unless some are given. It holds from the next token on, or from generated token `at_index`.
        """
        self._updates += 1
        update = steering_pb2.UpdateEdits(
            edits=edits,
            update_id=self._updates,
            read_outs=None if read_outs is None else steering_pb2.ReadOuts(read_outs=read_outs),
            at_index=at_index,
            presets=presets,
            size_limit=size_limit,
        )
        await self._send(steering_pb2.SessionRequest(update=update))
        return self._updates

    async def pause(self) -> None:
        """Holds the turn until `resume`; Paused follows."""
        await self._send(steering_pb2.SessionRequest(pause=steering_pb2.Pause()))

    async def resume(self) -> None:
        """Lets the turn go on; Resumed follows."""
        await self._send(steering_pb2.SessionRequest(resume=steering_pb2.Resume()))

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
