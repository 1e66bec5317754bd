"""A session: turns one after another, whose edits the client changes while tokens come."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from steer.v1 import steering_pb2

from steer_server.api import events
from steer_server.api.calls import Gate
from steer_server.api.edits import read_edits, write_edits
from steer_server.api.errors import reason_of, status_of
from steer_server.api.generations import Generations, Run
from steer_server.api.sessions import OpenSession
from steer_server.api.wire import admit, limits, read_generation
from steer_server.errors import EngineUnavailable, InvalidRequest, SteerError, WrongState
from steer_server.generation import Finish, FinishReason, RevisionApplied, StepOutput
from steer_server.program import Program

_T = TypeVar("_T")
_Response = steering_pb2.SessionResponse


@dataclass(frozen=True)
class _Update:
    """An update that the engine has and the client has no answer to."""

    update_id: int
    revision: int
    arrived: float


@dataclass(eq=False)
class _Turn:
    run: Run
    outputs: AsyncGenerator[StepOutput, None]
    next_output: asyncio.Task[StepOutput | None]
    unanswered: list[_Update] = field(default_factory=list)


class Session:
    """One bidirectional stream. Commands and outputs are merged as they come; none is lost."""

    def __init__(self, generations: Generations, gate: Gate, entry: OpenSession) -> None:
        self._generations = generations
        self._gate = gate
        self._entry = entry
        self._id = entry.session_id
        self._turn: _Turn | None = None

    async def run(
        self, commands: AsyncIterator[steering_pb2.SessionRequest]
    ) -> AsyncGenerator[_Response, None]:
        """The responses, until the client has half-closed and its last turn has ended.

        Closing it aborts the turn. Nothing is pulled from the engine while the client does not read.
        """
        command: asyncio.Task[steering_pb2.SessionRequest | None] | None = _pull(commands)
        draining = asyncio.ensure_future(self._gate.draining.wait())
        closed = asyncio.ensure_future(self._entry.closed.wait())
        try:
            while command or self._turn:
                await self._something(command, draining, closed)
                self._entry.touch()
                if closed.done():
                    raise self._entry.error()
                # Outputs first: a turn that has ended cannot be updated any more.
                if self._turn and self._turn.next_output.done():
                    for response in await self._on_output(self._turn):
                        yield response
                if command and command.done():
                    message = command.result()
                    command = _pull(commands) if message else None
                    for response in await self._on_command(message) if message else ():
                        yield response
                if draining.done() and not self._turn:
                    raise EngineUnavailable("the server is shutting down; the session ends")
        finally:
            await _stop(draining, closed, *([command] if command else []))
            if self._turn:
                await self._close(self._turn)

    async def _something(
        self,
        command: asyncio.Task | None,
        draining: asyncio.Task[Literal[True]],
        closed: asyncio.Task[Literal[True]],
    ) -> None:
        """Waits for a command, an output or the session's end; with no turn running, for the server's end too."""
        ending = self._turn.next_output if self._turn else draining
        waiting = {task for task in (command, ending, closed) if task}
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)

    async def _on_command(self, message: steering_pb2.SessionRequest) -> list[_Response]:
        match message.WhichOneof("command"):
            case "start_turn":
                return [self._start(message.start_turn)]
            case "update":
                return await self._update(message.update)
            case "cancel_turn":
                return await self._cancel()
            case _:
                raise InvalidRequest(
                    "set one of start_turn, update and cancel_turn", field="command"
                )

    def _start(self, message: steering_pb2.StartTurn) -> _Response:
        if self._turn:
            raise WrongState(
                "a turn runs; wait for turn_finished or send cancel_turn", field="start_turn"
            )
        if self._gate.draining.is_set():
            raise EngineUnavailable("the server is shutting down")
        if not message.HasField("generation"):
            raise InvalidRequest("required", field="start_turn.generation")
        engine, registry = self._generations.engine, self._generations.registry
        request = read_generation(message.generation, engine, registry, "start_turn.generation")
        self._entry.turns += 1
        name = f"{self._id}-{self._entry.turns}"
        run = self._generations.begin("Session", name, request, live=True)
        outputs = run.outputs()
        self._turn = _Turn(run, outputs, _pull(outputs))
        self._entry.generating = True
        return _Response(turn_started=events.started(name, request, engine.tokenizer))

    async def _update(self, message: steering_pb2.UpdateEdits) -> list[_Response]:
        arrived = time.perf_counter()
        engine, registry = self._generations.engine, self._generations.registry
        try:
            if self._turn is None:
                raise WrongState("no turn runs", field="update")
            edits = read_edits(message.edits, registry, limits(engine), "update.edits")
            program = admit(Program(edits), registry, self._turn.run.prompt_length, "update")
            revision = await self._turn.run.update(program.edits)
        except SteerError as error:
            return [self._rejected(message.update_id, error)]
        self._turn.unanswered.append(_Update(message.update_id, revision, arrived))
        return []

    async def _cancel(self) -> list[_Response]:
        turn = self._turn
        if turn is None:
            return []
        await self._close(turn)
        finish = Finish(
            FinishReason.ABORT,
            turn.run.prompt_length,
            turn.run.generated,
            cached_tokens=0,
            reports=(),
        )
        return self._finish(turn, finish)

    async def _on_output(self, turn: _Turn) -> list[_Response]:
        output = turn.next_output.result()
        if output is None:
            raise EngineUnavailable("the engine ended the generation without a finish")
        responses = self._applied(turn, output)
        responses += [_Response(tokens=tokens) for tokens in events.tokens(output)]
        if output.finish is None:
            turn.next_output = _pull(turn.outputs)
            return responses
        await self._close(turn)
        return responses + self._finish(turn, output.finish)

    def _applied(self, turn: _Turn, output: StepOutput) -> list[_Response]:
        """Answers to the updates that hold from a token of `output` on."""
        responses: list[_Response] = []
        while turn.unanswered:
            update = turn.unanswered[0]
            covering = _covering(output.applied, update.revision)
            if covering is None:
                break
            turn.unanswered.pop(0)
            waited = time.perf_counter() - update.arrived
            self._generations.metrics.live_update_seconds.observe(waited)
            applied = steering_pb2.UpdateApplied(
                update_id=update.update_id,
                revision=covering.revision,
                first_index=covering.first_index,
                edits=write_edits(turn.run.edits(covering.revision)),
            )
            responses.append(_Response(update_applied=applied))
        return responses

    def _finish(self, turn: _Turn, finish: Finish) -> list[_Response]:
        ended = WrongState("the turn ended before the update took effect", field="update")
        responses = [self._rejected(update.update_id, ended) for update in turn.unanswered]
        return [*responses, _Response(turn_finished=events.finished(finish))]

    def _rejected(self, update_id: int, error: SteerError) -> _Response:
        status = status_of(error, self._id)
        self._generations.metrics.rejected.labels(reason_of(status)).inc()
        rejected = steering_pb2.UpdateRejected(update_id=update_id)
        rejected.status.ParseFromString(status.SerializeToString())
        return _Response(update_rejected=rejected)

    async def _close(self, turn: _Turn) -> None:
        self._turn, self._entry.generating = None, False
        await _stop(turn.next_output)
        await turn.outputs.aclose()


def _covering(applied: tuple[RevisionApplied, ...], revision: int) -> RevisionApplied | None:
    """The first revision to hold that includes `revision`; the last of those that began together."""
    later = [entry for entry in applied if entry.revision >= revision]
    if not later:
        return None
    first = min(later, key=lambda entry: entry.revision)
    together = [entry for entry in later if entry.first_index == first.first_index]
    return max(together, key=lambda entry: entry.revision)


def _pull(iterator: AsyncIterator[_T]) -> asyncio.Task[_T | None]:
    """The next item, None at the end."""

    async def pull() -> _T | None:
        return await anext(iterator, None)

    return asyncio.ensure_future(pull())


async def _stop(*tasks: asyncio.Task) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
