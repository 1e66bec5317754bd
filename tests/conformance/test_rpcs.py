"""Every RPC that the server's reflection tells of answers a good request."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from steer.v1 import activations_pb2, admin_pb2, steering_pb2

from tests.conformance.contract import reflected
from tests.conformance.requests import GOOD, answers, held
from tests.unit.serving import Serving, serving

Happy = Callable[[Serving], Awaitable[Message]]


@pytest.fixture(scope="module")
async def methods(service: Serving) -> dict[str, MethodDescriptor]:
    return await asyncio.to_thread(reflected, service.target)


def good(rpc: str) -> Happy:
    """The last response to the RPC's good request."""

    async def call(service: Serving) -> Message:
        return (await answers(service, rpc, GOOD[rpc]))[-1]

    return call


async def watch_stats(service: Serving) -> Message:
    call = service.activations.WatchStats(activations_pb2.WatchStatsRequest())
    response = await call.read()
    call.cancel()
    return response


async def load(service: Serving) -> Message:
    response = await good("LoadDictionary")(service)
    await good("UnloadDictionary")(service)
    return response


async def unload(service: Serving) -> Message:
    await good("LoadDictionary")(service)
    return await good("UnloadDictionary")(service)


async def list_sessions(service: Serving) -> Message:
    async with held(service):
        return await good("ListSessions")(service)


async def close_session(service: Serving) -> Message:
    async with held(service, metadata=(("x-request-id", "closing"),)) as session:
        request = admin_pb2.CloseSessionRequest(session_id="closing")
        response = await service.admin.CloseSession(request)
        await session.code()
        return response


async def drain(_: Serving) -> Message:
    async with serving() as own:
        return await good("Drain")(own)


async def check(service: Serving) -> Message:
    request = health_pb2.HealthCheckRequest()
    return await health_pb2_grpc.HealthStub(service.channel).Check(request)


async def list_health(service: Serving) -> Message:
    request = health_pb2.HealthListRequest()
    return await health_pb2_grpc.HealthStub(service.channel).List(request)


async def watch_health(service: Serving) -> Message:
    call = health_pb2_grpc.HealthStub(service.channel).Watch(health_pb2.HealthCheckRequest())
    response = await call.read()
    call.cancel()
    return response


async def reflect(service: Serving) -> Message:
    asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    return await (
        reflection_pb2_grpc.ServerReflectionStub(service.channel).ServerReflectionInfo(asked).read()
    )


HAPPY: dict[str, Happy] = {
    "steer.v1.SteeringService.Generate": good("Generate"),
    "steer.v1.SteeringService.GenerateStream": good("GenerateStream"),
    "steer.v1.SteeringService.Session": good("Session"),
    "steer.v1.SteeringService.Compare": good("Compare"),
    "steer.v1.SteeringService.Score": good("Score"),
    "steer.v1.SteeringService.Patch": good("Patch"),
    "steer.v1.ActivationService.Encode": good("Encode"),
    "steer.v1.ActivationService.Inspect": good("Inspect"),
    "steer.v1.ActivationService.Contrast": good("Contrast"),
    "steer.v1.ActivationService.WatchStats": watch_stats,
    "steer.v1.DictionaryService.ListDictionaries": good("ListDictionaries"),
    "steer.v1.DictionaryService.GetDictionary": good("GetDictionary"),
    "steer.v1.DictionaryService.GetFeature": good("GetFeature"),
    "steer.v1.DictionaryService.BatchGetFeatures": good("BatchGetFeatures"),
    "steer.v1.DictionaryService.SearchFeatures": good("SearchFeatures"),
    "steer.v1.DictionaryService.NearestFeatures": good("NearestFeatures"),
    "steer.v1.AdminService.LoadDictionary": load,
    "steer.v1.AdminService.UnloadDictionary": unload,
    "steer.v1.AdminService.SetWatchList": good("SetWatchList"),
    "steer.v1.AdminService.ListSessions": list_sessions,
    "steer.v1.AdminService.CloseSession": close_session,
    "steer.v1.AdminService.Drain": drain,
    "steer.v1.ServerInfoService.GetServerInfo": good("GetServerInfo"),
    "grpc.health.v1.Health.Check": check,
    "grpc.health.v1.Health.List": list_health,
    "grpc.health.v1.Health.Watch": watch_health,
    "grpc.reflection.v1alpha.ServerReflection.ServerReflectionInfo": reflect,
}


async def test_every_method_that_reflection_tells_of_has_a_happy_path(
    methods: dict[str, MethodDescriptor],
):
    assert sorted(HAPPY) == sorted(methods)


@pytest.mark.parametrize("name", HAPPY)
async def test_a_good_request_is_answered_with_what_the_method_returns(
    service: Serving, methods: dict[str, MethodDescriptor], name: str
):
    response = await HAPPY[name](service)

    output = methods[name].output_type
    assert response.DESCRIPTOR.full_name == output.full_name
    assert response.ListFields() or not output.fields, "it says nothing"


async def test_a_good_update_holds(service: Serving):
    async with held(service) as session:
        await session.write(steering_pb2.SessionRequest(**GOOD["Update"]))
        async with asyncio.timeout(5):
            while not any(len(run.programs) > 1 for run in service.engine.running.values()):
                await asyncio.sleep(0.002)
        assert service.engine.steps
        service.engine.steps.release()
        response = await session.read()

    assert response.HasField("update_applied")
