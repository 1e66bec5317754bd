"""The open sessions, for those who look after the server."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from steer_server.errors import SessionClosed, SessionNotFound


@dataclass(eq=False)
class OpenSession:
    """What the book says of a session, which keeps it up to date."""

    session_id: str
    principal: str
    opened: float = field(default_factory=time.monotonic)
    touched: float = field(default_factory=time.monotonic)
    """Of its last command or output."""
    turns: int = 0
    generating: bool = False
    closed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when it is to end; it does so with `SESSION_CLOSED`."""

    def touch(self) -> None:
        """A command has come, or an output has gone."""
        self.touched = time.monotonic()

    def error(self) -> SessionClosed:
        """What its client is told once `closed` is set."""
        return SessionClosed(
            "the server's operator has closed this session; what came before is valid"
        )


class Sessions:
    """The book of the open sessions."""

    def __init__(self) -> None:
        self._open: dict[str, OpenSession] = {}

    @contextmanager
    def enter(self, session_id: str, principal: str = "") -> Iterator[OpenSession]:
        """The session is open within the block."""
        entry = self._open[session_id] = OpenSession(session_id, principal)
        try:
            yield entry
        finally:
            del self._open[session_id]

    def close(self, session_id: str, *, field: str = "") -> None:
        """Tells the session to end; SessionNotFound if it is not open."""
        if session_id not in self._open:
            raise SessionNotFound(
                f"no session {session_id[:64]!r} is open; ListSessions returns those that are",
                name=session_id[:64],
                field=field,
            )
        self._open[session_id].closed.set()

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[OpenSession]:
        """Oldest first."""
        return iter(list(self._open.values()))
