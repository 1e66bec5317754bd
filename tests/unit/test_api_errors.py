"""Every error of the contract, provoked over the wire."""

import math
from collections.abc import Iterator

import grpc
import pytest
from google.rpc import error_details_pb2
from steer.v1 import activations_pb2, edits_pb2, steering_pb2

from steer_client import (
    CallFailed,
    Feature,
    ablate,
    active,
    add,
    clamp,
    limit,
    patch,
    read,
    read_above,
    read_top,
    scale,
)
from steer_server import errors
from steer_server.api.errors import classify
from tests.unit.serving import NAME, NEVER_FIRED, Serving, collect, serving

Code = grpc.StatusCode
F = Feature(NAME, 2)


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


def excluding(positions) -> edits_pb2.Edit:
    return ablate(F, exclude=positions)


NO_UNIT = edits_pb2.Edit(dictionary=NAME, feature=2, clamp=edits_pb2.Clamp(value=1))
NO_KIND = edits_pb2.Edit(dictionary=NAME, feature=2)
BAD_PHASE = edits_pb2.Edit(
    dictionary=NAME, feature=2, ablate=edits_pb2.Ablate(), scope=edits_pb2.Scope(phases=[0])
)
TWICE_PATCHED = edits_pb2.Edit(
    dictionary=NAME,
    feature=2,
    patch=edits_pb2.Patch(positions=[1, 1], values=[1, 2], unit=edits_pb2.UNIT_ACTIVATION),
)
HALF_PATCHED = edits_pb2.Edit(
    dictionary=NAME,
    feature=2,
    patch=edits_pb2.Patch(positions=[1, 2], values=[1], unit=edits_pb2.UNIT_ACTIVATION),
)
NO_FEATURE = edits_pb2.Condition(dictionary=NAME)
INVALID, RANGE, MISSING, STATE = (
    Code.INVALID_ARGUMENT,
    Code.OUT_OF_RANGE,
    Code.NOT_FOUND,
    Code.FAILED_PRECONDITION,
)

EDITS = [
    ([clamp(F, math.nan)], INVALID, "generation.edits[0].clamp.value"),
    ([ablate((NAME, 1)), add(F, math.inf)], INVALID, "generation.edits[1].add.value"),
    ([add(F, math.inf, "norm")], INVALID, "generation.edits[0].add.value"),
    ([clamp(F, 3e38, "max")], INVALID, "generation.edits[0].clamp.value"),
    ([scale(F, -math.inf)], INVALID, "generation.edits[0].scale.factor"),
    ([NO_UNIT], INVALID, "generation.edits[0].clamp.unit"),
    ([clamp(F, 1, "norm")], INVALID, "generation.edits[0].clamp.unit"),
    ([NO_KIND], INVALID, "generation.edits[0].kind"),
    ([ablate((NAME, 32))], RANGE, "generation.edits[0].feature"),
    ([ablate(("other", 0))], MISSING, "generation.edits[0].dictionary"),
    ([ablate(F), scale(F, 2)], INVALID, "generation.edits[1].feature"),
    ([ablate((NAME, i % 32)) for i in range(65)], INVALID, "generation.edits"),
    ([clamp((NAME, NEVER_FIRED), 1, "max")], STATE, "generation.edits[0].clamp.unit"),
    ([add((NAME, NEVER_FIRED), 1, "max")], STATE, "generation.edits[0].add.unit"),
    (
        [excluding([3, 64])],
        INVALID,
        "generation.edits[0].scope.exclude_positions.positions[1]",
    ),
    (
        [excluding(range(1025))],
        INVALID,
        "generation.edits[0].scope.exclude_positions.positions",
    ),
    ([BAD_PHASE], INVALID, "generation.edits[0].scope.phases[0]"),
    (
        [ablate(F, only=["prompt", "prompt"])],
        INVALID,
        "generation.edits[0].scope.phases[1]",
    ),
    ([ablate(F, only=["prompt"], exclude=range(5))], INVALID, "generation.edits[0].scope"),
    ([limit(F)], INVALID, "generation.edits[0].limit"),
    ([limit(F, 2, 1)], INVALID, "generation.edits[0].limit.low"),
    ([limit(F, high=math.nan)], INVALID, "generation.edits[0].limit.high"),
    ([limit(F, 1, unit="norm")], INVALID, "generation.edits[0].limit.unit"),
    ([patch(F, {})], INVALID, "generation.edits[0].patch.positions"),
    ([patch(F, dict.fromkeys(range(4097), 1.0))], INVALID, "generation.edits[0].patch.positions"),
    ([TWICE_PATCHED], INVALID, "generation.edits[0].patch.positions[1]"),
    ([HALF_PATCHED], INVALID, "generation.edits[0].patch.values"),
    ([patch(F, {1: 1.0, 2: math.inf})], INVALID, "generation.edits[0].patch.values[1]"),
    ([patch(F, {1: 1.0}, "norm")], INVALID, "generation.edits[0].patch.unit"),
    ([patch(F, {-6: 1.0})], INVALID, "generation.edits[0].patch.positions"),
    ([patch(F, {64: 1.0})], INVALID, "generation.edits[0].scope"),
    ([ablate(F, at=[64])], INVALID, "generation.edits[0].scope.positions[0]"),
    ([ablate(F, at=range(1025))], INVALID, "generation.edits[0].scope.positions"),
    ([ablate(F, at=[-6])], INVALID, "generation.edits[0].scope.positions"),
    ([ablate(F, windows=[(64, None)])], INVALID, "generation.edits[0].scope.windows[0].first"),
    ([ablate(F, windows=[(1, 65)])], INVALID, "generation.edits[0].scope.windows[0].end"),
    ([ablate(F, windows=[(1, 2)] * 65)], INVALID, "generation.edits[0].scope.windows"),
    ([ablate(F, tokens=[1, 128])], INVALID, "generation.edits[0].scope.token_ids[1]"),
    (
        [ablate(F, exclude_tokens=[1] * 1025)],
        INVALID,
        "generation.edits[0].scope.exclude_token_ids",
    ),
    ([ablate(F, when=active((NAME, 32)))], RANGE, "generation.edits[0].when.feature"),
    ([ablate(F, when=active(("other", 1)))], MISSING, "generation.edits[0].when.dictionary"),
    ([ablate(F, when=NO_FEATURE)], INVALID, "generation.edits[0].when.feature"),
    ([ablate(F, when=active(above=math.inf))], INVALID, "generation.edits[0].when.above"),
]

READ_OUTS = [
    (activations_pb2.ReadOut(dictionary=NAME), INVALID, "selection"),
    (read_top(NAME, 0), INVALID, "top_k"),
    (read_top(NAME, 129), INVALID, "top_k"),
    (read_top("other", 1), MISSING, "dictionary"),
    (read(NAME, []), INVALID, "features.features"),
    (read(NAME, [1] * 257), INVALID, "features.features"),
    (read(NAME, [1, 1]), INVALID, "features.features"),
    (read(NAME, [1, 32]), RANGE, "features.features[1]"),
    (activations_pb2.ReadOut(dictionary=NAME, top_k=1, phases=[7]), INVALID, "phases[0]"),
    (activations_pb2.ReadOut(dictionary=NAME, top_k=1, stage=3), INVALID, "stage"),
    (read_above(NAME, -1.0), INVALID, "above.threshold"),
    (read_above(NAME, math.nan), INVALID, "above.threshold"),
    (read_above(NAME, 0.0, 7), INVALID, "above.row_bytes"),
    (read_above(NAME, 0.0, 32_769), INVALID, "above.row_bytes"),
]

SAMPLING = [
    ({"max_tokens": 0}, "max_tokens"),
    ({"temperature": -0.5}, "temperature"),
    ({"temperature": 2.5}, "temperature"),
    ({"temperature": math.nan}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.5}, "top_p"),
    ({"top_p": math.nan}, "top_p"),
    ({"stop": ["a", ""]}, "stop[1]"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"top_k": 2**31}, "top_k"),
    ({"seed": 2**63}, "seed"),
]

PROMPTS = [
    ({}, "generation.prompt", "INVALID_REQUEST"),
    ({"text": ""}, "generation.prompt.text", "INVALID_REQUEST"),
    ({"token_ids": {}}, "generation.prompt.token_ids.ids", "INVALID_REQUEST"),
    ({"token_ids": {"ids": [5, 128]}}, "generation.prompt.token_ids.ids[1]", "INVALID_REQUEST"),
    ({"text": "x" * 64}, "generation.prompt.text", "PROMPT_TOO_LONG"),
]


@pytest.mark.parametrize(("edits", "code", "field"), EDITS)
async def test_an_edit_that_cannot_be_made_is_refused_by_field(
    running: Serving, edits, code: Code, field: str
):
    error = await fails(running.steering.GenerateStream(request(edits=edits)))

    assert (error.code, error.field) == (code, field)
    assert str(error).startswith(field)
    assert error.reason


@pytest.mark.parametrize(("read_out", "code", "field"), READ_OUTS)
async def test_a_read_out_that_cannot_be_made_is_refused_by_field(
    running: Serving, read_out, code: Code, field: str
):
    good = read_top(NAME, 1)

    error = await fails(running.steering.GenerateStream(request(read_outs=[good, read_out])))

    assert (error.code, error.field) == (code, f"generation.read_outs[1].{field}")


@pytest.mark.parametrize(("sampling", "field"), SAMPLING)
async def test_wrong_sampling_is_refused_by_field(running: Serving, sampling: dict, field: str):
    error = await fails(running.steering.GenerateStream(request(sampling=sampling)))

    assert (error.code, error.field) == (INVALID, f"generation.sampling.{field}")


@pytest.mark.parametrize(("prompt", "field", "reason"), PROMPTS)
async def test_a_wrong_prompt_is_refused_by_field(
    running: Serving, prompt: dict, field: str, reason: str
):
    generation = steering_pb2.Generation(prompt=prompt)

    error = await fails(
        running.steering.GenerateStream(steering_pb2.GenerateStreamRequest(generation=generation))
    )

    assert (error.code, error.field, error.reason) == (INVALID, field, reason)


async def test_a_request_without_a_generation_is_refused(running: Serving):
    error = await fails(running.steering.GenerateStream(steering_pb2.GenerateStreamRequest()))

    assert (error.code, error.field) == (INVALID, "generation")


async def test_too_many_read_outs_are_refused(running: Serving):
    error = await fails(running.steering.GenerateStream(request(read_outs=[read_top(NAME, 1)] * 9)))

    assert (error.code, error.field) == (INVALID, "generation.read_outs")


@pytest.mark.parametrize(
    ("read_outs", "field"),
    [
        ([], "read_outs"),
        ([read_top(NAME, 1)] * 9, "read_outs"),
        ([read_top(NAME, 1, only=["generated"])], "read_outs[0].phases"),
        ([read_top(NAME, 0)], "read_outs[0].top_k"),
        ([read_top(NAME, 1, skip_cached=True)], "read_outs[0].skip_cached"),
    ],
)
async def test_encode_refuses_wrong_read_outs(running: Serving, read_outs, field: str):
    wanted = activations_pb2.EncodeRequest(prompt={"text": "hi"}, read_outs=read_outs)

    error = await fails(running.activations.Encode(wanted))

    assert (error.code, error.field) == (INVALID, field)


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
