"""Refusals that take more than one request, or a server of their own."""

import asyncio
import math

import grpc
import pytest
from steer.v1 import dictionaries_pb2, steering_pb2

from steer_client import CallFailed, clamp, rejection
from steer_server import memory
from steer_server.admission import MAX_UPDATES
from steer_server.api.session import SessionLimits
from tests.conformance.requests import GOOD, PATIENCE, held, refused
from tests.unit.serving import NAME, Serving, serving


async def too_many_calls(_: Serving) -> CallFailed:
    async with serving(max_calls=1) as own, held(own):
        return await refused(own, "GenerateStream", {})


async def no_template(_: Serving) -> CallFailed:
    async with serving() as own:
        own.engine.tokenizer.chats = False
        return await refused(own, "Generate", {"generation.prompt": {"chat": {}}})


async def no_memory(service: Serving) -> CallFailed:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(memory, "available_bytes", lambda: 10)
        return await refused(service, "LoadDictionary", {})


async def no_root(_: Serving) -> CallFailed:
    async with serving() as own:
        return await refused(own, "LoadDictionary", {})


async def unload_in_use(service: Serving) -> CallFailed:
    async with held(service):
        return await refused(service, "UnloadDictionary", {"name": NAME})


async def second_turn(service: Serving) -> CallFailed:
    async with held(service) as session:
        await session.write(steering_pb2.SessionRequest(**GOOD["Session"]))
        return await failure(session)


async def update_without_turn(service: Serving) -> CallFailed:
    session = service.steering.Session()
    await session.write(steering_pb2.SessionRequest(**GOOD["Update"]))
    response = await session.read()
    await session.done_writing()
    return rejection(response.update_rejected)


async def one_update_too_many(_: Serving) -> CallFailed:
    """Each of the others is the engine's: the server waits for no time to pass between two."""
    limits = SessionLimits(updates_per_second=math.inf)
    async with serving(limits=limits) as own, held(own) as session:
        for number in range(1, MAX_UPDATES + 2):
            update = {"update_id": number, "edits": [clamp((NAME, 2), number)]}
            await session.write(steering_pb2.SessionRequest(update=update))
        async with asyncio.timeout(PATIENCE):
            rejected = (await session.read()).update_rejected
        assert rejected.update_id == MAX_UPDATES + 1
        return rejection(rejected)


async def page_of_another_search(service: Serving) -> CallFailed:
    query = {"query": "n", "page_size": 1}
    request = dictionaries_pb2.SearchFeaturesRequest(**query)
    first = await service.dictionaries.SearchFeatures(request)
    assert first.next_page_token
    change = {"query": "a", "page_token": first.next_page_token}
    return await refused(service, "SearchFeatures", change)


async def failure(call) -> CallFailed:
    """How a call that may have answered ends."""
    try:
        while await call.read() is not grpc.aio.EOF:
            pass
    except grpc.aio.AioRpcError as error:
        return CallFailed.from_rpc(error)
    raise AssertionError("it ended well")
