"""Which dictionaries running generations use: one cannot go while any does."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager


class Uses:
    """The running generations' dictionaries."""

    def __init__(self) -> None:
        self._running: dict[int, set[str]] = {}
        self._ended = asyncio.Event()

    @contextmanager
    def hold(self, names: set[str]) -> Iterator[None]:
        """A generation runs within the block, which may add to `names`."""
        self._running[id(names)] = names
        try:
            yield
        finally:
            del self._running[id(names)]
            self._ended.set()

    def count(self, name: str) -> int:
        """Running generations that use the dictionary."""
        return sum(name in names for names in self._running.values())

    async def until_unused(self, name: str) -> None:
        """Returns when no running generation uses the dictionary."""
        while self.count(name):
            self._ended.clear()
            await self._ended.wait()
