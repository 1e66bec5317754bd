"""What every call passes through: ids, trace context, deadlines, the access log, back-pressure."""

import asyncio
import gc
import json
import logging
from collections.abc import Iterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from steer.v1 import dictionaries_pb2, steering_pb2, steering_pb2_grpc

from steer_client import CallFailed
from steer_server.api import calls
from steer_server.api.interceptor import Policy
from steer_server.api.server import SERVICES
from steer_server.logs import JsonFormatter, TextFormatter
from tests.unit.serving import NAME, Serving, collect, serving

Code = grpc.StatusCode
LIST = dictionaries_pb2.ListDictionariesRequest()


def request(max_tokens: int = 2, text: str = "hello") -> steering_pb2.GenerateStreamRequest:
    generation = steering_pb2.Generation(prompt={"text": text}, sampling={"max_tokens": max_tokens})
    return steering_pb2.GenerateStreamRequest(generation=generation)


def value(metadata, key: str) -> list[str]:
    return [entry for name, entry in metadata or () if name == key]


async def failed(call) -> CallFailed:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return CallFailed.from_rpc(caught.value)


@pytest.mark.parametrize("given", ["a", "Order-66_b.c", "x" * 64])
async def test_the_clients_request_id_comes_back_and_names_the_generation(given: str):
    async with serving() as service:
        call = service.steering.GenerateStream(request(), metadata=(("x-request-id", given),))
        events = await collect(call)

        assert value(await call.initial_metadata(), "x-request-id") == [given]
        assert events[0].started.request_id == given
        assert service.engine.finished == [given]


@pytest.mark.parametrize("given", ["", "x" * 65, "a b", "a/b", "a:1"])
async def test_a_request_id_that_is_none_is_replaced(given: str):
    async with serving() as service:
        call = service.dictionaries.ListDictionaries(LIST, metadata=(("x-request-id", given),))
        await call
        (answered,) = value(await call.initial_metadata(), "x-request-id")

    assert answered != given
    assert len(answered) == 16


async def test_a_request_id_that_runs_is_refused_and_free_again_afterwards():
    mine = (("x-request-id", "mine"),)
    async with serving() as service:
        service.engine.steps = asyncio.Semaphore(0)
        running = service.steering.GenerateStream(request(), metadata=mine)
        await running.read()

        refused = await failed(service.dictionaries.ListDictionaries(LIST, metadata=mine))
        running.cancel()
        async with asyncio.timeout(5):
            while not service.engine.aborted:
                await asyncio.sleep(0.005)
        await service.dictionaries.ListDictionaries(LIST, metadata=mine)

    assert (refused.code, refused.reason) == (Code.ALREADY_EXISTS, "DUPLICATE_REQUEST")
    assert refused.request_id == "mine"


TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({}, None),
        ({"traceparent": TRACE}, {"traceparent": TRACE}),
        (
            {"traceparent": TRACE, "tracestate": "a=1,b=2"},
            {"traceparent": TRACE, "tracestate": "a=1,b=2"},
        ),
        ({"traceparent": TRACE, "tracestate": "a" * 513}, {"traceparent": TRACE}),
        ({"tracestate": "a=1"}, None),
        ({"traceparent": TRACE.upper()}, None),
        ({"traceparent": TRACE.replace("4bf92f3577b34da6a3ce929d0e0e4736", "0" * 32)}, None),
    ],
)
async def test_the_trace_context_is_there_for_the_engine(metadata: dict, expected):
    async with serving() as service:
        seen = []
        generate = service.engine.generate

        def spy(generation):
            seen.append(calls.trace_headers())
            return generate(generation)

        service.engine.generate = spy
        await collect(service.steering.GenerateStream(request(), metadata=tuple(metadata.items())))

    assert seen == [expected]


async def test_a_call_with_no_time_left_is_refused_before_it_runs():
    async with serving() as service:
        refused = {"reason": "DEADLINE_TOO_SHORT"}
        # On a busy machine the client's own clock may end a call before the server has seen it.
        for _ in range(50):
            late = await failed(service.dictionaries.ListDictionaries(LIST, timeout=0.09))
            if service.metric("steer_requests_rejected_total", **refused):
                break
        await service.dictionaries.ListDictionaries(LIST, timeout=5)

        assert late.code is Code.DEADLINE_EXCEEDED
        assert service.metric("steer_requests_rejected_total", **refused) == 1


async def test_metadata_beyond_8_kib_is_refused():
    async with serving() as service:
        fits = await service.dictionaries.ListDictionaries(LIST, metadata=(("x-a", "a" * 7000),))
        error = await failed(
            service.dictionaries.ListDictionaries(LIST, metadata=(("x-a", "a" * 9000),))
        )

    assert len(fits.dictionaries) == 1
    assert error.code is Code.RESOURCE_EXHAUSTED


async def test_health_and_reflection_answer_while_no_call_is_admitted():
    async with serving(max_calls=1) as service:
        service.engine.steps = asyncio.Semaphore(0)
        running = service.steering.GenerateStream(request())
        await running.read()
        full = await failed(service.dictionaries.ListDictionaries(LIST))
        health = await health_pb2_grpc.HealthStub(service.channel).Check(
            health_pb2.HealthCheckRequest(service=SERVICES[0])
        )
        asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        stub = reflection_pb2_grpc.ServerReflectionStub(service.channel)
        reflected = await stub.ServerReflectionInfo(asked).read()
        running.cancel()

    assert full.code is Code.RESOURCE_EXHAUSTED
    assert health.status == health_pb2.HealthCheckResponse.SERVING
    assert reflected.list_services_response.service


async def test_a_call_that_is_not_admitted_may_be_retried_by_grpc_itself():
    # gRPC's own retries end where a server has sent initial metadata.
    policy = {
        "methodConfig": [
            {
                "name": [{}],
                "retryPolicy": {
                    "maxAttempts": 5,
                    "initialBackoff": "0.05s",
                    "maxBackoff": "0.2s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ]
    }
    options = [("grpc.service_config", json.dumps(policy))]
    async with (
        serving(ready=False) as service,
        grpc.aio.insecure_channel(service.target, options=options) as channel,
    ):
        call = steering_pb2_grpc.SteeringServiceStub(channel).GenerateStream(request())
        waiting = asyncio.ensure_future(collect(call))
        await asyncio.sleep(0.03)
        await service.server.open()

        assert len(await waiting) == 4


@pytest.fixture
def access(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.INFO, "steer.access"):
        yield caplog


def lines(caplog: pytest.LogCaptureFixture) -> list[dict]:
    """Of the access log, as JSON."""
    return [
        json.loads(JsonFormatter().format(record))
        for record in caplog.records
        if record.name == "steer.access"
    ]


async def test_each_call_is_one_line_of_the_access_log(access: pytest.LogCaptureFixture):
    async with serving() as service:
        mine = (("x-request-id", "mine"),)
        await collect(service.steering.GenerateStream(request(), metadata=mine))
        await failed(
            service.dictionaries.GetFeature(
                dictionaries_pb2.GetFeatureRequest(dictionary=NAME, feature=99)
            )
        )
        health = health_pb2_grpc.HealthStub(service.channel)
        await health.Check(health_pb2.HealthCheckRequest())

    generated, refused = lines(access)
    assert (
        generated.items()
        >= {
            "level": "INFO",
            "logger": "steer.access",
            "message": "call",
            "request_id": "mine",
            "method": "steer.v1.SteeringService/GenerateStream",
            "principal": "",
            "code": "OK",
            "reason": "",
            "messages": 4,
        }.items()
    )
    assert generated["peer"].startswith("ipv4:127.0.0.1:")
    assert 0 < generated["seconds"] < 5
    assert (refused["code"], refused["reason"], refused["messages"]) == (
        "OUT_OF_RANGE",
        "UNKNOWN_FEATURE",
        0,
    )


async def test_no_log_has_a_prompt_or_a_text(access: pytest.LogCaptureFixture):
    async with serving() as service:
        events = await collect(service.steering.GenerateStream(request(20, text="sesame")))
        text = "".join(event.tokens.text for event in events)

    logged = "\n".join(map(JsonFormatter().format, access.records))
    assert "GenerateStream" in logged
    assert "sesame" not in logged
    assert json.dumps(text, ensure_ascii=False)[1:-1] not in logged


async def test_a_cancelled_call_is_logged_as_such(access: pytest.LogCaptureFixture):
    async with serving() as service:
        service.engine.steps = asyncio.Semaphore(0)
        call = service.steering.GenerateStream(request())
        await call.read()
        call.cancel()
        async with asyncio.timeout(5):
            while not lines(access):
                await asyncio.sleep(0.005)

    (line,) = lines(access)
    assert (line["code"], line["messages"]) == ("CANCELLED", 1)


def test_log_lines_are_one_json_object_each_or_words_with_fields():
    record = logging.LogRecord("steer", logging.ERROR, "", 0, "it %s\nbadly", ("went",), None)
    record.fields = {"code": "OK", "seconds": 0.5}
    try:
        raise ValueError("why")
    except ValueError as error:
        record.exc_info = (type(error), error, error.__traceback__)

    as_json = JsonFormatter().format(record)
    assert "\n" not in as_json
    parsed = json.loads(as_json)
    assert (parsed["message"], parsed["level"], parsed["code"]) == ("it went\nbadly", "ERROR", "OK")
    assert parsed["exception"].endswith("ValueError: why")
    assert parsed["time"].endswith("Z")
    assert "ERROR it went\nbadly code=OK seconds=0.5\n" in TextFormatter().format(record)


SMALL_WINDOW = (("grpc.http2.lookahead_bytes", 4096), ("grpc.http2.bdp_probe", 0))
ENDLESS = 50_000


async def stalled(service: Serving, stub, kind: str):
    """A stream whose client has read one message and then reads no more."""
    service.engine.max_model_len = 10 * ENDLESS
    if kind == "Session":
        call = stub.Session()
        start = steering_pb2.StartTurn(generation=request(ENDLESS).generation)
        await call.write(steering_pb2.SessionRequest(start_turn=start))
    else:
        call = stub.GenerateStream(request(ENDLESS))
    await call.read()
    return call


async def read_on(call) -> None:
    """To the end; CallFailed if it is an error."""
    try:
        while await call.read() is not grpc.aio.EOF:
            pass
    except grpc.aio.AioRpcError as error:
        raise CallFailed.from_rpc(error) from error


@pytest.mark.parametrize("kind", ["GenerateStream", "Session"])
async def test_a_client_that_does_not_read_loses_its_call_and_is_told_so(kind: str):
    policy = Policy(slow_reader_seconds=0.2)
    async with (
        serving(policy=policy) as service,
        grpc.aio.insecure_channel(service.target, options=SMALL_WINDOW) as channel,
    ):
        call = await stalled(service, steering_pb2_grpc.SteeringServiceStub(channel), kind)
        async with asyncio.timeout(5):
            while not service.engine.aborted:
                await asyncio.sleep(0.01)
        generated = len(service.engine.computed)
        assert service.metric("steer_stream_slow_reader_aborts_total") == 1
        assert service.metric("steer_stream_write_wait_seconds_bucket", le="0.1") > 0
        assert service.metric("grpc_server_handled_total", grpc_code="ABORTED") == 1

        with pytest.raises(CallFailed, match=r"waited 0\.2 s") as told:
            await read_on(call)

        # Nothing of it is left to wait for.
        await asyncio.wait_for(service.server.drain(10), 1)

    assert generated < ENDLESS
    assert (told.value.code, told.value.reason) == (Code.ABORTED, "SLOW_READER")


async def test_a_client_that_reads_slowly_but_reads_keeps_its_call():
    policy = Policy(slow_reader_seconds=1.0)
    async with (
        serving(policy=policy) as service,
        grpc.aio.insecure_channel(service.target, options=SMALL_WINDOW) as channel,
    ):
        service.engine.max_model_len = ENDLESS
        stub = steering_pb2_grpc.SteeringServiceStub(channel)
        call = stub.GenerateStream(request(1500))
        received = 0
        while (await call.read()) is not grpc.aio.EOF:
            received += 1
            if received % 250 == 0:
                await asyncio.sleep(0.25)

        assert received == 1502
        assert service.metric("steer_stream_slow_reader_aborts_total") == 0


async def test_a_stalled_client_that_goes_away_leaves_nothing(caplog: pytest.LogCaptureFixture):
    async with serving(policy=Policy(slow_reader_seconds=0.2)) as service:
        async with grpc.aio.insecure_channel(service.target, options=SMALL_WINDOW) as channel:
            stub = steering_pb2_grpc.SteeringServiceStub(channel)
            await stalled(service, stub, "GenerateStream")
            async with asyncio.timeout(5):
                while not service.engine.aborted:
                    await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        gc.collect()

        tasks = [task for task in asyncio.all_tasks() if "HandleExceptions" in task.get_name()]
        assert tasks == []
        assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []
