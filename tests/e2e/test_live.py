"""Live updates beside other generations: when they hold, and that they hold exactly from there."""

import asyncio
import random

import pytest
from steer.v1 import steering_pb2

from steer_client import SteerClient, add
from steer_server.dictionary.edits import AddRelative
from tests.e2e.engines import MODES
from tests.e2e.helpers import IOI
from tests.e2e.reference import Reference

pytestmark = [pytest.mark.e2e, pytest.mark.nightly, pytest.mark.timeout(1200)]

# Triton's interpreter is slow.
SESSIONS, UPDATES, TOKENS, OTHERS = (1, 5, 24, 4) if "v2" in MODES else (10, 10, 64, 8)


async def others(client: SteerClient) -> None:
    """Generates until it is cancelled."""
    while True:
        async for _ in client.generate("Once upon a time", max_tokens=200, ignore_eos=True):
            pass


async def updated(client: SteerClient, draw: random.Random) -> tuple[list[int], dict, dict]:
    """The tokens of a session; by update its feature, and (tokens seen when it was sent, first index)."""
    moments = sorted(draw.sample(range(2, TOKENS - 8), UPDATES))
    ids, features, found = [], {}, {}
    async with client.session() as session:
        await session.start(IOI, temperature=0, max_tokens=TOKENS, ignore_eos=True)
        async for event in session:
            match event:
                case steering_pb2.Tokens():
                    ids += event.ids
                    while moments and len(ids) >= moments[0]:
                        moments.pop(0)
                        feature = draw.randrange(1000)
                        edit = add(("random", feature), 0.4, "norm")
                        update_id = await session.update([edit])
                        features[update_id], found[update_id] = feature, (len(ids), None)
                case steering_pb2.UpdateApplied():
                    seen, _ = found[event.update_id]
                    found[event.update_id] = seen, event.first_index
                case steering_pb2.Finished():
                    return ids, features, found
    raise AssertionError("the session ended without an end")


async def test_updates_hold_exactly_from_the_token_they_name(
    client: SteerClient, reference: Reference
) -> None:
    draw = random.Random(0)
    noise = [asyncio.create_task(others(client)) for _ in range(OTHERS)]
    try:
        sessions = [await updated(client, draw) for _ in range(SESSIONS)]
    finally:
        for task in noise:
            task.cancel()
        await asyncio.gather(*noise, return_exceptions=True)

    prompt = reference.tokenize(IOI)
    late = []
    for ids, features, found in sessions:
        late += [first - seen for seen, first in found.values()]
        starts = sorted((first, features[update_id]) for update_id, (_, first) in found.items())

        def edits(position: int, starts=starts) -> tuple[AddRelative, ...]:
            held = [f for first, f in starts if len(prompt) + first - 1 <= position]
            return (AddRelative(held[-1], 0.4),) if held else ()

        assert tuple(ids) == reference.generate(prompt, TOKENS, edits).token_ids
    late.sort()
    print(f"{len(late)} updates, tokens late: median {late[len(late) // 2]}, max {late[-1]}")
    assert len(late) == SESSIONS * UPDATES
    assert late[int(0.99 * len(late))] <= 2
