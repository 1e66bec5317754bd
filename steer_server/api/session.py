"""A session: turns one after another, whose edits the client changes while tokens come."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field, replace

from steer.v1 import steering_pb2

from steer_server.api import events
from steer_server.api.calls import Gate, require_observe
from steer_server.api.edits import write_edits
from steer_server.api.errors import reason_of, status_of
from steer_server.api.generations import Generations, Run
from steer_server.api.read_outs import read_read_outs, write_read_outs
from steer_server.api.sessions import OpenSession
from steer_server.api.streams import Bell, pull, stop
from steer_server.api.wire import read_generation, read_program
from steer_server.errors import (
    EngineUnavailable,
    InvalidRequest,
    PositionOutOfRange,
    SessionExpired,
    SteerError,
    WrongState,
)
from steer_server.generation import Finish, FinishReason, RevisionApplied, StepOutput
from steer_server.program import Program, ReadOut

_Response = steering_pb2.SessionResponse


@dataclass(frozen=True)
class SessionLimits:
    """What a session may do."""

    idle_seconds: float = 300.0
    """It ends when neither a command nor an output has come for so long."""
    max_seconds: float = 3600.0
    """It ends after so long."""
    updates_per_second: float = 50.0
    """Of those that come faster the last one counts."""


@dataclass(frozen=True)
class _Asked:
    """An update that the client sent."""

    update_id: int
    arrived: float


@dataclass(frozen=True)
class _Update:
    """Updates that are one to the engine."""

    program: Program
    at_index: int | None
    asked: tuple[_Asked, ...]
    revision: int = 0
    """0: the engine does not have it yet."""


@dataclass(eq=False)
class _Turn:
    run: Run
    max_tokens: int
    outputs: AsyncGenerator[StepOutput, None]
    next_output: asyncio.Task[StepOutput | None]
    read_outs: tuple[ReadOut, ...]
    """That the last update asked for, or the turn began with."""
    taken_read_outs: tuple[ReadOut, ...]
    """Those of the last update that the engine took."""
    revision: int = 0
    """The one under which the last token sent was drawn."""
    unanswered: list[_Update] = field(default_factory=list)
    """Those that the engine has."""
    held: _Update | None = None
    """What came too soon after the last one."""
    next_update: float = 0.0
    """When the engine may have another one."""
    paused: bool = False


class Session:
    """One bidirectional stream. Commands and outputs are merged as they come; none is lost."""

    def __init__(
        self, generations: Generations, gate: Gate, entry: OpenSession, limits: SessionLimits
    ) -> None:
        self._generations = generations
        self._gate = gate
        self._entry = entry
        self._limits = limits
        self._turn: _Turn | None = None
        self._bell = Bell()
        self._draining = False
        """Whether the client knows that the server shuts down."""

    async def run(
        self, commands: AsyncIterator[steering_pb2.SessionRequest]
    ) -> AsyncGenerator[_Response, None]:
        """The responses, until the client has half-closed and its last turn has ended.

        Closing it aborts the turn. Nothing is pulled from the engine while the client does not read.
        """
        bell = self._bell
        command: asyncio.Task[steering_pb2.SessionRequest | None] | None = bell.hang(pull(commands))
        draining = bell.hang(asyncio.ensure_future(self._gate.draining.wait()))
        closed = bell.hang(asyncio.ensure_future(self._entry.closed.wait()))
        try:
            while command or self._turn:
                await bell.rung(self._due())
                # Outputs first: a turn that has ended cannot be updated any more.
                if self._turn and self._turn.next_output.done():
                    self._entry.touch()
                    for response in await self._on_output(self._turn):
                        yield response
                if command and command.done():
                    self._entry.touch()
                    message = command.result()
                    command = bell.hang(pull(commands)) if message else None
                    for response in await self._on_command(message) if message else ():
                        yield response
                for response in [*self._on_end(), *await self._on_time()]:
                    yield response
        finally:
            bell.close()
            waiting = [draining, closed, *([command] if command else [])]
            if self._turn:
                waiting.append(self._turn.next_output)
            # All are cancelled before the first wait, which a client that leaves cuts short.
            await stop(*waiting)
            if self._turn:
                await self._close(self._turn)

    def _due(self) -> float:
        """When there is something to do even if neither a command nor an output comes."""
        due = self._entry.touched + self._limits.idle_seconds
        due = min(due, self._entry.opened + self._limits.max_seconds)
        if self._turn and self._turn.held:
            due = min(due, self._turn.next_update)
        return due

    def _on_end(self) -> list[_Response]:
        """Sees to it that the session ends when the server, or its operator, wants it to."""
        if self._entry.closed.is_set():
            raise self._entry.error()
        if not self._gate.draining.is_set():
            return []
        if not self._turn:
            raise EngineUnavailable("the server is shutting down; the session ends")
        if self._draining:
            return []
        self._draining = True
        return [_Response(draining=steering_pb2.Draining(seconds=int(self._gate.drain_seconds)))]

    async def _on_time(self) -> list[_Response]:
        now, limits = time.monotonic(), self._limits
        if now >= self._entry.opened + limits.max_seconds:
            raise SessionExpired(
                f"a session lasts {limits.max_seconds:g} s at most; open another one"
            )
        if now >= self._entry.touched + limits.idle_seconds:
            raise SessionExpired(
                f"neither a command nor a token for {limits.idle_seconds:g} s; open another one"
            )
        turn = self._turn
        if turn and turn.held and now >= turn.next_update:
            return await self._send(turn)
        return []

    async def _on_command(self, message: steering_pb2.SessionRequest) -> list[_Response]:
        match message.WhichOneof("command"):
            case "start_turn":
                return [await self._start(message.start_turn)]
            case "update":
                return await self._update(message.update)
            case "cancel_turn":
                return await self._cancel()
            case "pause":
                return await self._pause(True)
            case "resume":
                return await self._pause(False)
            case _:
                raise InvalidRequest(
                    "set one of start_turn, update, cancel_turn, pause and resume", field="command"
                )

    async def _start(self, message: steering_pb2.StartTurn) -> _Response:
        if self._turn:
            raise WrongState(
                "a turn runs; wait for turn_finished or send cancel_turn", field="start_turn"
            )
        if not message.HasField("generation"):
            raise InvalidRequest("required", field="start_turn.generation")
        served = self._generations.served
        request = await read_generation(message.generation, served, "start_turn.generation")
        if self._gate.draining.is_set():
            raise EngineUnavailable("the server is shutting down")
        self._entry.turns += 1
        self._entry.generating = True
        name = f"{self._entry.session_id}:{self._entry.turns}"
        run = self._generations.begin("Session", name, request, live=True)
        outputs = run.outputs()
        max_tokens, read_outs = request.sampling.max_tokens, request.program.read_outs
        pulled = self._bell.hang(pull(outputs))
        self._turn = _Turn(run, max_tokens, outputs, pulled, read_outs, read_outs)
        # To read a long prompt takes time, too.
        self._entry.touch()
        return _Response(turn_started=events.started(name, request, served.engine.tokenizer))

    async def _update(self, message: steering_pb2.UpdateEdits) -> list[_Response]:
        asked = _Asked(message.update_id, time.perf_counter())
        turn = self._turn
        at_index = message.at_index if message.HasField("at_index") else None
        responses: list[_Response] = []
        if turn and turn.held and turn.held.at_index != at_index:
            responses = await self._send(turn)
        try:
            if turn is None:
                raise WrongState("no turn runs", field="update")
            program = self._read_update(message, turn)
            turn.run.use(program)
        except SteerError as error:
            return [*responses, self._rejected(asked, error)]
        earlier = turn.held.asked if turn.held else ()
        turn.held = _Update(program, at_index, (*earlier, asked))
        turn.read_outs = program.read_outs
        if time.monotonic() >= turn.next_update:
            responses += await self._send(turn)
        return responses

    def _read_update(self, message: steering_pb2.UpdateEdits, turn: _Turn) -> Program:
        served = self._generations.served
        read_outs = turn.read_outs
        if message.HasField("read_outs"):
            require_observe("update.read_outs")
            where = "update.read_outs.read_outs"
            read_outs = read_read_outs(message.read_outs.read_outs, served.registry, where)
        if message.HasField("at_index") and message.at_index >= turn.max_tokens:
            raise PositionOutOfRange(
                f"token {message.at_index} is not in 0..{turn.max_tokens - 1}, what the turn may generate",
                field="update.at_index",
            )
        return read_program(message, served, turn.run.prompt_length, "update", read_outs)

    async def _send(self, turn: _Turn) -> list[_Response]:
        """Gives the engine the update that is held."""
        update, turn.held = turn.held, None
        assert update is not None
        turn.next_update = time.monotonic() + 1 / self._limits.updates_per_second
        try:
            revision = await turn.run.update(update.program, update.at_index)
        except SteerError as error:
            if error.field:
                error.field = f"update.{error.field}"
            turn.read_outs = turn.taken_read_outs
            return [self._rejected(asked, error) for asked in update.asked]
        turn.taken_read_outs = update.program.read_outs
        turn.unanswered.append(replace(update, revision=revision))
        return []

    async def _pause(self, pause: bool) -> list[_Response]:
        turn = self._turn
        if turn is None or turn.paused == pause:
            return []
        try:
            await (turn.run.pause() if pause else turn.run.resume())
        except WrongState:
            # It has just ended, as the client is about to learn.
            return []
        turn.paused = pause
        if pause:
            return [_Response(paused=steering_pb2.Paused())]
        return [_Response(resumed=steering_pb2.Resumed())]

    async def _cancel(self) -> list[_Response]:
        turn = self._turn
        if turn is None:
            return []
        await self._close(turn)
        run = turn.run
        finish = Finish(
            FinishReason.ABORT, run.prompt_length, run.generated, run.cached_tokens, reports=()
        )
        return self._finish(turn, finish)

    async def _on_output(self, turn: _Turn) -> list[_Response]:
        output = turn.next_output.result()
        if output is None:
            raise EngineUnavailable("the engine ended the generation without a finish")
        responses, output = self._applied(turn, output)
        turn.revision = turn.run.revision
        responses += events.tokens(_Response, output, turn.revision)
        if output.finish is None:
            turn.next_output = self._bell.hang(pull(turn.outputs))
            return responses
        await self._close(turn)
        return responses + self._finish(turn, output.finish)

    def _applied(self, turn: _Turn, output: StepOutput) -> tuple[list[_Response], StepOutput]:
        """Answers to the updates that hold from a token of `output` on, and what is then left of it.

        Rows that were computed before are sent before: they count their read-outs in those that held.
        """
        responses: list[_Response] = []
        while turn.unanswered:
            update = turn.unanswered[0]
            covering = _covering(output.applied, update.revision)
            if covering is None:
                break
            turn.unanswered.pop(0)
            parts = [rows.split(covering.first_row) for rows in output.activations]
            before, after = (tuple(part[side] for part in parts) for side in (0, 1))
            earlier = StepOutput(output.first_index, (), "", activations=before)
            responses += events.tokens(_Response, earlier, turn.revision)
            output = output._replace(activations=after)
            for asked in update.asked:
                waited = time.perf_counter() - asked.arrived
                self._generations.metrics.live_update_seconds.observe(waited)
                applied = steering_pb2.UpdateApplied(
                    update_id=asked.update_id,
                    revision=covering.revision,
                    first_index=covering.first_index,
                    edits=write_edits(turn.run.edits(covering.revision)),
                    read_outs=write_read_outs(turn.run.read_outs(covering.revision)),
                )
                responses.append(_Response(update_applied=applied))
        return responses, output

    def _finish(self, turn: _Turn, finish: Finish) -> list[_Response]:
        ended = WrongState("the turn ended before the update took effect", field="update")
        left = [*turn.unanswered, *([turn.held] if turn.held else [])]
        responses = [self._rejected(asked, ended) for update in left for asked in update.asked]
        return [*responses, _Response(turn_finished=events.finished(finish))]

    def _rejected(self, asked: _Asked, error: SteerError) -> _Response:
        status = status_of(error, self._entry.session_id)
        self._generations.metrics.rejected.labels(reason_of(status)).inc()
        rejected = steering_pb2.UpdateRejected(update_id=asked.update_id)
        rejected.status.ParseFromString(status.SerializeToString())
        return _Response(update_rejected=rejected)

    async def _close(self, turn: _Turn) -> None:
        self._turn = None
        self._entry.generating = False
        await stop(turn.next_output)
        await turn.outputs.aclose()


def _covering(applied: tuple[RevisionApplied, ...], revision: int) -> RevisionApplied | None:
    """The first revision to hold that includes `revision`; the last of those that began together."""
    later = [entry for entry in applied if entry.revision >= revision]
    if not later:
        return None
    first = min(later, key=lambda entry: entry.revision)
    together = [entry for entry in later if entry.first_row == first.first_row]
    return max(together, key=lambda entry: entry.revision)
