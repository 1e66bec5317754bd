"""Which dictionaries running generations use: one cannot go while any does."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from steer_server.api import calls
from steer_server.dictionary.files import StoredDictionary

Held = dict[str, StoredDictionary]
"""By name."""


class Uses:
    """The running generations' dictionaries."""

    def __init__(self) -> None:
        self._running: dict[int, tuple[str, Held]] = {}
        """Each with the call that it is of."""
        self._ended = asyncio.Event()

    @contextmanager
    def hold(self, dictionaries: Held) -> Iterator[None]:
        """A generation, or a call that makes some, runs within the block, which may add to `dictionaries`."""
        self._running[id(dictionaries)] = calls.request_id(), dictionaries
        try:
            yield
        finally:
            del self._running[id(dictionaries)]
            self._ended.set()

    def find(self, name: str) -> StoredDictionary | None:
        """The dictionary, if somebody uses it."""
        return next((held[name] for _, held in self._running.values() if name in held), None)

    def count(self, name: str) -> int:
        """Running calls that use the dictionary."""
        return len({call for call, held in self._running.values() if name in held})

    async def until_unused(self, name: str) -> None:
        """Returns when no running call uses the dictionary."""
        while self.count(name):
            self._ended.clear()
            await self._ended.wait()
