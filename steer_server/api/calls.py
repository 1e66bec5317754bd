"""The RPC that a task serves: its id, who makes it, what it may; and the gate that all RPCs pass."""

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from steer_server.api import auth
from steer_server.api.auth import ANYONE, Principal, Scope
from steer_server.api.quotas import Quotas
from steer_server.errors import AnswerTooLarge, EngineUnavailable, Overloaded

MAX_REQUEST_BYTES = 4 << 20
MAX_RESPONSE_BYTES = 16 << 20
"""Of one message."""


@dataclass(frozen=True)
class Call:
    """One RPC from its admission to its end."""

    request_id: str = ""
    principal: Principal = ANYONE
    trace_headers: Mapping[str, str] | None = None
    quotas: Quotas = field(default_factory=lambda: Quotas(0, 0))


_call: ContextVar[Call] = ContextVar("call", default=Call())  # noqa: B039 - nobody's, never changed


def enter(call: Call) -> None:
    """From now on this task, and those it starts, serve `call`."""
    _call.set(call)


def request_id() -> str:
    """The id of the RPC that this task serves."""
    return _call.get().request_id


def principal() -> Principal:
    """Who makes the RPC that this task serves."""
    return _call.get().principal


def trace_headers() -> Mapping[str, str] | None:
    """The W3C trace context that came with the RPC, as vLLM takes it; None if there was none."""
    return _call.get().trace_headers


def require_observe(field: str) -> None:
    """PermissionDenied, naming `field`, if the caller may not read activations."""
    principal = _call.get().principal
    why = "for a text can be reconstructed from its activations"
    auth.require(principal, Scope.OBSERVE, field=field, why=why)


def check_tokens() -> None:
    """QuotaExceeded if the caller has used its tokens of this minute; asked before each generation."""
    _call.get().quotas.check_tokens(_call.get().principal)


def count_tokens(tokens: int) -> None:
    """Charges the caller for tokens of prompt or answer."""
    _call.get().quotas.count_tokens(_call.get().principal, tokens)


def check_size(size: int) -> None:
    """AnswerTooLarge for an answer of more bytes than a message has."""
    if size > MAX_RESPONSE_BYTES:
        raise AnswerTooLarge(
            f"the answer takes {size} bytes, a message at most {MAX_RESPONSE_BYTES}; ask for less, or by an RPC that streams"
        )


class Gate:
    """Admits RPCs while the server is ready, and counts those that run."""

    def __init__(self, limit: int) -> None:
        self.ready = False
        self.draining = asyncio.Event()
        self.drain_seconds = 0.0
        self.idle = asyncio.Event()
        self.idle.set()
        self._limit = limit
        self._running = 0

    @property
    def running(self) -> int:
        """Calls that were admitted and have not ended."""
        return self._running

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Holds a place for one RPC; EngineUnavailable or Overloaded if there is none."""
        if self.draining.is_set():
            raise EngineUnavailable("the server is shutting down; try another one")
        if not self.ready:
            raise EngineUnavailable("the server is starting")
        if self._running >= self._limit:
            raise Overloaded(f"{self._running} calls run, as many as may")
        self._running += 1
        self.idle.clear()
        try:
            yield
        finally:
            self._running -= 1
            if not self._running:
                self.idle.set()
