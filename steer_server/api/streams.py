"""Several asynchronous streams at once."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterable, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

_T = TypeVar("_T")


def pull(iterator: AsyncIterator[_T]) -> asyncio.Task[_T | None]:
    """The next item, None at the end."""

    async def next_item() -> _T | None:
        return await anext(iterator, None)

    return asyncio.ensure_future(next_item())


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
