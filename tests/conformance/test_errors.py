"""Every row of the error table is seen on the wire, with its code and its reason."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc
import pytest
from steer.v1 import admin_pb2, steering_pb2, steering_pb2_grpc

from steer_client import CallFailed
from steer_server import errors
from steer_server.api import calls
from steer_server.api import errors as wire
from steer_server.api.auth import Scope, TokenFile, new_token
from steer_server.api.interceptor import Policy
from steer_server.api.session import SessionLimits
from tests.conformance.cases import Change
from tests.conformance.contract import reasons
from tests.conformance.requests import GOOD, held, refused
from tests.conformance.scenes import (
    failure,
    no_memory,
    no_root,
    no_template,
    second_turn,
    too_many_calls,
    unload_in_use,
)
from tests.unit.serving import NAME, Serving, serving

Ask = Callable[[Serving, Path], Awaitable[CallFailed]]


def wrong(rpc: str, change: Change) -> Ask:
    return lambda service, _: refused(service, rpc, change)


def scene(ask: Callable[[Serving], Awaitable[CallFailed]]) -> Ask:
    return lambda service, _: ask(service)


def failing(error: errors.SteerError) -> Ask:
    """The engine fails so in place of the second token."""

    async def ask(_: Serving, __: Path) -> CallFailed:
        async with serving() as own:
            own.engine.failure = error
            return await refused(own, "Generate", {})

    return ask


async def used_up(_: Serving, folder: Path) -> CallFailed:
    token, entry = new_token("few", [Scope.INFER, Scope.OBSERVE])
    file = folder / "tokens.toml"
    file.write_text(entry + "max_calls = 1\n")
    bearer = (("authorization", f"Bearer {token}"),)
    async with (
        serving(policy=Policy(tokens=TokenFile(file))) as own,
        held(own, metadata=bearer),
    ):
        return await failure(own.steering.Session(metadata=bearer))


async def no_token(_: Serving, folder: Path) -> CallFailed:
    file = folder / "tokens.toml"
    file.write_text(new_token("any", [Scope.INFER])[1])
    async with serving(policy=Policy(tokens=TokenFile(file))) as own:
        return await refused(own, "GetServerInfo", {})


async def no_scope(_: Serving, folder: Path) -> CallFailed:
    token, entry = new_token("any", [Scope.ADMIN])
    file = folder / "tokens.toml"
    file.write_text(entry)
    async with serving(policy=Policy(tokens=TokenFile(file))) as own:
        metadata = (("authorization", f"Bearer {token}"),)
        return await failure(own.steering.Session(metadata=metadata))


async def same_id(service: Serving, _: Path) -> CallFailed:
    mine = (("x-request-id", "mine"),)
    async with held(service, metadata=mine):
        return await failure(service.steering.Session(metadata=mine))


async def no_time(service: Serving, _: Path) -> CallFailed:
    # On a busy machine the client's own clock may end a call before the server has answered.
    for _ in range(50):
        error = await failure(service.steering.Session(timeout=0.09))
        if error.reason:
            break
    return error


async def nobody_reads(_: Serving, __: Path) -> CallFailed:
    window = (("grpc.http2.lookahead_bytes", 4096), ("grpc.http2.bdp_probe", 0))
    change = {"generation": {"prompt": {"text": "a"}, "sampling": {"max_tokens": 50_000}}}
    async with (
        serving(policy=Policy(slow_reader_seconds=0.1)) as own,
        grpc.aio.insecure_channel(own.target, options=window) as channel,
    ):
        own.engine.max_model_len = 100_000
        call = steering_pb2_grpc.SteeringServiceStub(channel).GenerateStream(
            steering_pb2.GenerateStreamRequest(**change)
        )
        await call.read()
        async with asyncio.timeout(5):
            while not own.engine.aborted:
                await asyncio.sleep(0.01)
        return await failure(call)


async def too_large(service: Serving, _: Path) -> CallFailed:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(calls, "MAX_RESPONSE_BYTES", 10)
        return await refused(service, "GetServerInfo", {})


async def not_ready(_: Serving, __: Path) -> CallFailed:
    async with serving(ready=False) as own:
        return await refused(own, "GetServerInfo", {})


async def closed(service: Serving, _: Path) -> CallFailed:
    async with held(service, metadata=(("x-request-id", "closing"),)) as session:
        await service.admin.CloseSession(admin_pb2.CloseSessionRequest(session_id="closing"))
        return await failure(session)


async def idle(_: Serving, __: Path) -> CallFailed:
    async with serving(limits=SessionLimits(idle_seconds=0.02)) as own:
        return await failure(own.steering.Session())


REFUSED: dict[type[errors.SteerError], Ask] = {
    errors.InvalidRequest: wrong("Encode", {"read_outs": []}),
    errors.UnknownFeature: wrong("GetFeature", {"feature": 32}),
    errors.PositionOutOfRange: wrong("Patch", {"positions[0].source": 5}),
    errors.ConflictingEdits: wrong("Score", {"edits": [GOOD["Score"]["edits"][0]] * 2}),
    errors.PromptTooLong: wrong("Score", {"prompt.text": "a" * 64}),
    errors.EditTooLarge: wrong("Score", {"size_limit": {"max_relative_size": 1e-6}}),
    errors.DictionaryNotFound: wrong("GetDictionary", {"dictionary": "other"}),
    errors.PresetNotFound: wrong("Score", {"presets": ["other"]}),
    errors.UnsupportedModel: scene(no_template),
    errors.NameTaken: wrong("LoadDictionary", {"name": NAME}),
    errors.DictionaryMismatch: wrong("NearestFeatures", {"among": "wide"}),
    errors.DictionaryInUse: scene(unload_in_use),
    errors.CorruptDictionary: wrong("LoadDictionary", {"folder": "broken"}),
    errors.Overloaded: scene(too_many_calls),
    errors.QuotaExceeded: used_up,
    errors.Unauthenticated: no_token,
    errors.PermissionDenied: no_scope,
    errors.DuplicateRequest: same_id,
    errors.DeadlineTooShort: no_time,
    errors.SlowReader: nobody_reads,
    errors.AnswerTooLarge: too_large,
    errors.OutOfMemory: scene(no_memory),
    errors.EngineUnavailable: not_ready,
    errors.EditNotApplied: failing(errors.EditNotApplied("edit 0")),
    errors.WrongState: scene(second_turn),
    errors.SessionClosed: closed,
    errors.SessionExpired: idle,
    errors.SessionNotFound: wrong("CloseSession", {"session_id": "other"}),
    errors.NotConfigured: scene(no_root),
}
NEVER_SENT: dict[type[errors.SteerError], str] = {
    errors.NotFound: "each of its kinds has a row of its own, and nothing else is raised",
    errors.UnsupportedVllm: "the server does not start",
    errors.InvalidConfig: "the server does not start",
}
"""Rows that no call can bring about, and why."""


def test_every_row_of_the_error_table_is_provoked_or_excused():
    assert set(wire._TABLE) == REFUSED.keys() | NEVER_SENT.keys()
    assert not REFUSED.keys() & NEVER_SENT.keys()


def test_every_reason_that_a_comment_names_is_in_the_table():
    assert reasons() - {reason for _, reason in wire._TABLE.values()} == set()


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
async def test_an_error_comes_with_its_code_and_reason(
    service: Serving, tmp_path: Path, kind: type[errors.SteerError]
):
    error = await REFUSED[kind](service, tmp_path)

    assert (error.code, error.reason) == wire._TABLE[kind]
    assert str(error)
    assert error.request_id
