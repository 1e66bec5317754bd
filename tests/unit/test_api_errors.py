"""What an error says beside its code, and how the server fails. That each bound is refused: tests/conformance."""

from collections.abc import Iterator

import grpc
import pytest
from google.rpc import error_details_pb2
from steer.v1 import steering_pb2

from steer_client import (
    CallFailed,
    ablate,
    clamp,
)
from steer_server import errors
from steer_server.api.errors import classify
from tests.unit.serving import NAME, NEVER_FIRED, Serving, collect, serving

Code = grpc.StatusCode


@pytest.fixture(scope="module")
async def running():
    async with serving() as service:
        yield service


async def fails(call) -> CallFailed:
    with pytest.raises(CallFailed) as caught:
        await collect(call)
    return caught.value


def request(**fields) -> steering_pb2.GenerateStreamRequest:
    generation = steering_pb2.Generation(**fields)
    if not generation.HasField("prompt"):
        generation.prompt.text = "hello"
    return steering_pb2.GenerateStreamRequest(generation=generation)


def unpacked(error: CallFailed, kind):
    for detail in error.status.details:
        found = kind()
        if detail.Unpack(found):
            return found
    raise AssertionError(f"no {kind.__name__} in {error.status}")


async def test_an_error_carries_the_standard_details(running: Serving):
    error = await fails(running.steering.GenerateStream(request(edits=[ablate(("other", 0))])))

    info = unpacked(error, error_details_pb2.ErrorInfo)
    assert (info.domain, info.reason) == ("steer", "DICTIONARY_NOT_FOUND")
    resource = unpacked(error, error_details_pb2.ResourceInfo)
    assert (resource.resource_type, resource.resource_name) == ("steer.v1.Dictionary", "other")
    violation = unpacked(error, error_details_pb2.BadRequest).field_violations[0]
    assert violation.field == "generation.edits[0].dictionary"
    assert NAME in str(error), "the message says what there is"
    assert len(error.request_id) == 16


async def test_a_failed_precondition_says_which(running: Serving):
    edits = [clamp((NAME, NEVER_FIRED), 1, "max")]

    error = await fails(running.steering.GenerateStream(request(edits=edits)))

    violation = unpacked(error, error_details_pb2.PreconditionFailure).violations[0]
    assert violation.type == "DICTIONARY_MISMATCH"


@pytest.mark.parametrize(
    ("failure", "code", "reason", "retry"),
    [
        (errors.EditNotApplied("edit 0"), Code.INTERNAL, "NOT_APPLIED", None),
        (errors.EngineUnavailable("dead"), Code.UNAVAILABLE, "ENGINE_UNAVAILABLE", 1.0),
        (errors.Overloaded("full"), Code.RESOURCE_EXHAUSTED, "OVERLOADED", 1.0),
    ],
)
async def test_an_engine_error_ends_the_stream(failure, code: Code, reason: str, retry):
    async with serving() as service:
        service.engine.failure = failure

        error = await fails(service.steering.GenerateStream(request()))

    assert (error.code, error.reason, error.retry_seconds) == (code, reason, retry)


async def test_an_unforeseen_error_is_logged_and_not_shown(caplog: pytest.LogCaptureFixture):
    async with serving() as service:
        service.engine.failure = ZeroDivisionError("secret")

        error = await fails(service.steering.GenerateStream(request()))

    assert (error.code, error.reason) == (Code.INTERNAL, "INTERNAL")
    assert "secret" not in str(error)
    assert error.request_id in str(error)
    assert error.request_id in caplog.text
    assert "ZeroDivisionError: secret" in caplog.text


async def test_more_calls_than_may_run_are_refused_with_a_delay():
    async with serving(max_calls=1) as service:
        first = service.steering.Session()
        await first.write(
            steering_pb2.SessionRequest(start_turn={"generation": request().generation})
        )
        await first.read()

        error = await fails(service.steering.GenerateStream(request()))
        first.cancel()

    assert (error.code, error.retry_seconds) == (Code.RESOURCE_EXHAUSTED, 1.0)


async def test_a_server_that_is_not_ready_refuses():
    async with serving(ready=False) as service:
        error = await fails(service.steering.GenerateStream(request()))

    assert (error.code, error.retry_seconds) == (Code.UNAVAILABLE, 1.0)


def subclasses(kind: type) -> Iterator[type]:
    for child in kind.__subclasses__():
        yield child
        yield from subclasses(child)


@pytest.mark.parametrize(
    "kind",
    [kind for kind in subclasses(errors.SteerError) if kind.__module__.startswith("steer_server")],
)
def test_every_error_class_has_a_code_and_a_reason(kind: type[errors.SteerError]):
    code, reason = classify(kind)

    assert code is not Code.OK
    assert reason.isupper()


def test_an_error_class_of_no_known_family_has_none():
    class Stray(errors.SteerError):
        pass

    with pytest.raises(LookupError, match="Stray"):
        classify(Stray)
