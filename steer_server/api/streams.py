"""Several asynchronous streams at once."""

import asyncio
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterable, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

_T = TypeVar("_T")


def pull(iterator: AsyncIterator[_T]) -> asyncio.Task[_T | None]:
    """The next item, None at the end."""

    async def next_item() -> _T | None:
        return await anext(iterator, None)

    return asyncio.ensure_future(next_item())


class Bell:
    """Wakes who waits for any of some tasks or for a time. asyncio.wait would begin anew, and end, with each of them."""

    def __init__(self) -> None:
        self._rings = asyncio.Event()
        self._due = math.inf
        self._timer: asyncio.TimerHandle | None = None

    def hang(self, task: asyncio.Task[_T]) -> asyncio.Task[_T]:
        """It rings when the task has ended; returns the task."""
        task.add_done_callback(lambda _: self._rings.set())
        return task

    async def rung(self, due: float) -> None:
        """Returns when it has rung since the last call, or at `due` of time.monotonic(); it may, too, for no reason."""
        if due < self._due:
            self.close()
            self._due = due
            after = max(0.0, due - time.monotonic())
            self._timer = asyncio.get_running_loop().call_later(after, self._at_due)
        await self._rings.wait()
        self._rings.clear()

    def close(self) -> None:
        """It does not ring at a time any more."""
        if self._timer:
            self._timer.cancel()

    def _at_due(self) -> None:
        # By now it may be due later; then the next call says so.
        self._due = math.inf
        self._rings.set()


async def stop(*tasks: asyncio.Task) -> None:
    """Cancels them, and returns when they have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def together(coroutines: Iterable[Coroutine[Any, Any, _T]]) -> list[_T]:
    """Their results in order; the first error ends all."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await stop(*tasks)


async def merged(
    streams: Sequence[AsyncGenerator[_T, None]],
) -> AsyncGenerator[tuple[int, _T], None]:
    """(number of the stream, item) as they come; the first error ends all. Closing it closes the streams.

    At most one item of each waits for the reader.
    """
    if len(streams) == 1:
        async with aclosing(streams[0]) as stream:
            async for item in stream:
                yield 0, item
        return
    pending = {pull(stream): number for number, stream in enumerate(streams)}
    try:
        while pending:
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=pending.__getitem__):
                number, item = pending.pop(task), task.result()
                if item is not None:
                    pending[pull(streams[number])] = number
                    yield number, item
    finally:
        await stop(*pending)
        for stream in streams:
            await stream.aclose()
