"""How many updates one turn takes, over the wire."""

import asyncio
import math

import grpc

from steer_client import SteerClient, clamp, rejection
from steer_server.admission import MAX_UPDATES
from steer_server.api.session import SessionLimits
from tests.unit.serving import NAME, serving

# None is held back for another that comes too soon after it.
LIMITS = SessionLimits(updates_per_second=math.inf)


async def test_one_update_more_than_a_turn_takes_is_rejected_and_the_turn_goes_on():
    async with (
        asyncio.timeout(20),
        serving(limits=LIMITS) as service,
        SteerClient(service.target) as client,
        client.session() as session,
    ):
        service.engine.steps = asyncio.Semaphore(0)
        events = aiter(session)
        await session.start("hello", max_tokens=1)
        sent = [await session.update([clamp((NAME, 2), n)]) for n in range(MAX_UPDATES + 2)]
        started, *rejected = [await anext(events) for _ in range(3)]
        service.engine.steps.release()
        *applied, tokens, finished = [await anext(events) for _ in range(MAX_UPDATES + 2)]
        await session.start("hello", max_tokens=1)
        again = await session.update([])
        next_turn = await anext(events)
        while len(service.engine.running[next_turn.request_id].programs) < 2:
            await asyncio.sleep(0.005)
        service.engine.steps.release()
        first = await anext(events)

    assert [event.update_id for event in rejected] == sent[MAX_UPDATES:]
    for event in rejected:
        error = rejection(event)
        assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
        assert "at most 256 updates; go on in a new one" in str(error)
    assert [event.update_id for event in applied] == sent[:MAX_UPDATES]
    assert {(event.revision, event.edits[0].clamp.value) for event in applied} == {(256, 255)}
    assert (tokens.revision, finished.usage.generated_tokens) == (256, 1)
    assert next_turn.request_id != started.request_id
    assert (first.update_id, first.revision) == (again, 1)
