"""The server around the services: health, reflection, dictionaries, draining, its own metrics."""

import asyncio
import socket

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from steer.v1 import dictionaries_pb2, steering_pb2

from steer_client import CallFailed
from steer_server.api.server import SERVICES, Server, address
from steer_server.errors import InvalidConfig
from steer_server.metrics import Metrics
from tests.unit.serving import NAME, Serving, collect, serving, small_dictionary

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def request(max_tokens: int = 2) -> steering_pb2.GenerateStreamRequest:
    generation = steering_pb2.Generation(
        prompt={"text": "hello"}, sampling={"max_tokens": max_tokens}
    )
    return steering_pb2.GenerateStreamRequest(generation=generation)


async def remaining(call) -> list:
    found = []
    while (response := await call.read()) is not grpc.aio.EOF:
        found.append(response)
    return found


async def health(service: Serving, name: str) -> int:
    stub = health_pb2_grpc.HealthStub(service.channel)
    return (await stub.Check(health_pb2.HealthCheckRequest(service=name))).status


async def test_services_are_healthy_only_when_ready_the_process_always():
    async with serving(ready=False) as service:
        before = [await health(service, name) for name in ("", *SERVICES)]
        await service.server.open()
        ready = [await health(service, name) for name in ("", *SERVICES)]
        await service.server.drain(0)
        draining = [await health(service, name) for name in ("", *SERVICES)]
        await service.server.fail()
        failed = await health(service, "")

    assert SERVICES == (
        "steer.v1.SteeringService",
        "steer.v1.ActivationService",
        "steer.v1.DictionaryService",
        "steer.v1.AdminService",
        "steer.v1.ServerInfoService",
    )
    assert before == draining == [SERVING] + [NOT_SERVING] * 5
    assert ready == [SERVING] * 6
    assert failed == NOT_SERVING


async def test_a_health_watch_stays_open_and_sees_the_drain():
    async with serving() as service:
        stub = health_pb2_grpc.HealthStub(service.channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service=SERVICES[0]))
        first = await watch.read()
        await service.server.drain(0)
        second = await watch.read()
        watch.cancel()

    assert (first.status, second.status) == (SERVING, NOT_SERVING)


async def test_reflection_lists_the_services():
    async with serving() as service:
        stub = reflection_pb2_grpc.ServerReflectionStub(service.channel)
        call = stub.ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        )
        answer = await call.read()
        await call.read()

    assert set(SERVICES) <= {entry.name for entry in answer.list_services_response.service}


async def test_draining_refuses_new_calls_and_lets_running_ones_end():
    async with serving() as service:
        service.engine.steps = asyncio.Semaphore(1)
        running = service.steering.GenerateStream(request())
        await running.read()
        await running.read()
        drain = asyncio.ensure_future(service.server.drain(10))
        await asyncio.sleep(0.05)

        with pytest.raises(CallFailed) as refused:
            await collect(service.steering.GenerateStream(request()))
        assert not drain.done()
        service.engine.steps.release()
        rest = await remaining(running)
        await asyncio.wait_for(drain, 5)

    assert refused.value.code is grpc.StatusCode.UNAVAILABLE
    assert refused.value.retry_seconds == 1
    assert rest[-1].WhichOneof("event") == "finished"


async def test_a_drain_ends_at_its_deadline_and_the_stop_aborts_the_rest():
    async with serving() as service:
        service.engine.steps = asyncio.Semaphore(1)
        running = service.steering.GenerateStream(request())
        await running.read()
        await service.server.drain(0.05)
        await service.server.stop()

        with pytest.raises(grpc.aio.AioRpcError) as cut:
            await remaining(running)
        async with asyncio.timeout(5):
            while service.engine.running:
                await asyncio.sleep(0.005)

    assert cut.value.code() is grpc.StatusCode.UNAVAILABLE
    assert len(service.engine.aborted) == 1


async def test_a_stop_after_a_drain_cuts_no_answer_that_is_on_its_way():
    # To gRPC, health's Watch is such a one: its call runs and holds no place of the gate.
    async with serving() as service:
        stub = health_pb2_grpc.HealthStub(service.channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service=SERVICES[0]))
        await watch.read()
        await service.server.drain(10)
        await watch.read()
        stop = asyncio.ensure_future(service.server.stop())
        await asyncio.sleep(0.2)

        assert not watch.done()
        watch.cancel()
        await asyncio.wait_for(stop, 0.5)


async def test_draining_ends_a_session_between_turns_at_once():
    async with serving() as service:
        session = service.steering.Session()
        await session.write(steering_pb2.SessionRequest(start_turn=start()))
        for _ in range(4):
            last = await session.read()
        assert last.WhichOneof("event") == "turn_finished"

        await service.server.drain(10)

        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await session.read()
    assert ended.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_draining_lets_a_sessions_turn_end():
    async with serving() as service:
        service.engine.steps = asyncio.Semaphore(1)
        session = service.steering.Session()
        await session.write(steering_pb2.SessionRequest(start_turn=start(max_tokens=4)))
        await session.read()
        drain = asyncio.ensure_future(service.server.drain(10))
        seen = [await session.read()]
        while seen[-1].WhichOneof("event") != "draining":
            seen.append(await session.read())
        assert seen[-1].draining.seconds == 10
        for _ in range(3):
            service.engine.steps.release()
        while seen[-1].WhichOneof("event") != "turn_finished":
            seen.append(await session.read())
        await asyncio.wait_for(drain, 5)

    events = [response.WhichOneof("event") for response in seen]
    assert sorted(events[:-1]) == ["draining"] + ["tokens"] * 4


def start(max_tokens: int = 2) -> steering_pb2.StartTurn:
    return steering_pb2.StartTurn(generation=request(max_tokens).generation)


async def test_a_taken_port_is_an_error_that_names_it():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        server = Server(Metrics("fake", [], {}))

        with pytest.raises(InvalidConfig, match=str(taken.getsockname()[1])) as caught:
            server.bind("127.0.0.1", taken.getsockname()[1])

    assert caught.value.field == "port"


async def test_two_servers_never_share_a_port():
    first, second = (Server(Metrics("fake", [], {})) for _ in range(2))
    port = first.bind("127.0.0.1", 0)

    with pytest.raises(InvalidConfig, match=str(port)):
        second.bind("127.0.0.1", port)


def test_an_ipv6_address_is_written_in_brackets():
    assert address("::", 1) == "[::]:1"
    assert address("0.0.0.0", 1) == "0.0.0.0:1"


async def test_dictionaries_are_listed_with_what_their_card_says():
    async with serving() as service:
        answer = await service.dictionaries.ListDictionaries(
            dictionaries_pb2.ListDictionariesRequest()
        )

    (entry,) = answer.dictionaries
    assert (entry.name, entry.site, entry.d_model, entry.n_features) == (
        NAME,
        "resid_post.1",
        8,
        32,
    )
    assert entry.sha256 == small_dictionary().sha256
    assert entry.labelled_features == 1
    assert entry.quality.l0 == 12


async def test_a_feature_comes_with_statistics_and_evidence():
    async with serving() as service:
        wanted = dictionaries_pb2.GetFeatureRequest(dictionary=NAME, feature=3)
        feature = (await service.dictionaries.GetFeature(wanted)).feature

    assert (feature.index, feature.label, feature.max_activation) == (3, "names", 4)
    assert feature.density == 0.25
    assert list(feature.examples[0].tokens) == ["a", "b"]
    assert (feature.logits_up[0].token, feature.logits_down[0].effect) == (" Mary", -1.0)
    assert len(feature.quantiles) == 6


@pytest.mark.parametrize(
    ("dictionary", "feature", "code", "field"),
    [
        ("other", 0, grpc.StatusCode.NOT_FOUND, "dictionary"),
        ("", 0, grpc.StatusCode.NOT_FOUND, "dictionary"),
        (NAME, 32, grpc.StatusCode.OUT_OF_RANGE, "feature"),
    ],
)
async def test_an_unknown_feature_is_refused_by_field(dictionary, feature, code, field):
    async with serving() as service:
        wanted = dictionaries_pb2.GetFeatureRequest(dictionary=dictionary, feature=feature)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await service.dictionaries.GetFeature(wanted)

    error = CallFailed.from_rpc(caught.value)
    assert (error.code, error.field) == (code, field)


async def test_calls_are_counted_by_method_and_code():
    async with serving() as service:
        await collect(service.steering.GenerateStream(request()))
        await health(service, "")
        with pytest.raises(CallFailed):
            await collect(service.steering.GenerateStream(steering_pb2.GenerateStreamRequest()))

        generate = {"grpc_service": "steer.v1.SteeringService", "grpc_method": "GenerateStream"}
        assert service.metric("grpc_server_started_total", **generate) == 2
        assert service.metric("grpc_server_handled_total", **generate, grpc_code="OK") == 1
        refused = {**generate, "grpc_code": "INVALID_ARGUMENT", "grpc_type": "server_stream"}
        assert service.metric("grpc_server_handled_total", **refused) == 1
        assert service.metric("grpc_server_handling_seconds_count", **generate) == 2
        assert (
            service.metric("grpc_server_started_total", grpc_service="grpc.health.v1.Health") == 1
        )
