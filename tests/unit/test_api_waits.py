"""What the streams wait with: a limit on each write, a bell for several tasks and a time."""

import asyncio
import time
from contextlib import closing

import pytest

from steer_server.api.patience import Patience
from steer_server.api.streams import Bell


async def test_each_wait_has_the_whole_limit_and_time_between_waits_does_not_count():
    with closing(Patience(0.1)) as patience:
        for _ in range(4):
            with patience:
                await asyncio.sleep(0.04)
            await asyncio.sleep(0.12)

        began = time.monotonic()
        with pytest.raises(TimeoutError), patience:
            await asyncio.sleep(5)

    assert 0.1 <= time.monotonic() - began < 1


async def test_a_limit_that_was_passed_leaves_the_task_as_it_was():
    task = asyncio.current_task()
    assert task is not None
    with closing(Patience(0.02)) as patience:
        for _ in range(2):
            with pytest.raises(TimeoutError), patience:
                await asyncio.sleep(5)
        with patience:
            await asyncio.sleep(0)

    assert task.cancelling() == 0
    await asyncio.sleep(0.05)


async def test_who_is_cancelled_by_somebody_else_ends_even_when_the_limit_was_passed():
    async def wait() -> None:
        with closing(Patience(0.02)) as patience, patience:
            # Deaf for long enough that both have come.
            time.sleep(0.05)
            await asyncio.sleep(5)

    for impatient in (False, True):
        task = asyncio.create_task(wait())
        await asyncio.sleep(0 if impatient else 0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_an_error_of_the_wait_itself_goes_on():
    with closing(Patience(1)) as patience, pytest.raises(ValueError, match="its own"), patience:
        raise ValueError("its own")


async def test_a_bell_rings_for_each_task_that_ends_and_at_the_time():
    bell, event = Bell(), asyncio.Event()
    far = time.monotonic() + 100
    ended = bell.hang(asyncio.create_task(asyncio.sleep(0)))
    await ended
    late = bell.hang(asyncio.create_task(event.wait()))
    await asyncio.wait_for(bell.rung(far), 1)

    waiting = asyncio.create_task(bell.rung(far))
    await asyncio.sleep(0.05)
    assert not waiting.done(), "nothing has ended since"
    event.set()
    await asyncio.wait_for(waiting, 1)
    assert late.done()

    began = time.monotonic()
    await asyncio.wait_for(bell.rung(began + 0.05), 1)
    assert time.monotonic() - began >= 0.045
    bell.close()


async def test_a_bell_that_was_set_for_an_earlier_time_rings_again_at_the_later_one():
    bell = Bell()
    began = time.monotonic()
    early = asyncio.create_task(bell.rung(began + 0.05))
    await asyncio.sleep(0)
    early.cancel()

    while time.monotonic() < began + 0.1:
        await asyncio.wait_for(bell.rung(began + 0.1), 1)

    assert time.monotonic() - began < 0.5
    bell.close()
