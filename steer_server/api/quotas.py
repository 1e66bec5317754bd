"""What each principal has running and has used, against what it may."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from steer_server.api.auth import Principal, Quota
from steer_server.errors import Overloaded, QuotaExceeded

_MINUTE = 60.0
_RETRY_SECONDS = 1.0


@dataclass
class Usage:
    """Of one principal; a token of prompt or answer counts as soon as it was computed."""

    calls: int = 0
    sessions: int = 0
    owed: float = 0.0
    """Tokens used and not yet forgiven, as of `at`."""
    at: float = 0.0


class Quotas:
    """Admits calls of principals. Kept in this process: each replica of a server counts for itself."""

    def __init__(
        self,
        max_sessions: int,
        max_sessions_each: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`max_sessions` in all; `max_sessions_each` for a principal whose quota says nothing of it."""
        self._max_sessions = max_sessions
        self._max_sessions_each = max_sessions_each
        self._clock = clock
        self._sessions = 0
        self._usages: dict[str, Usage] = {}

    @contextmanager
    def call(self, principal: Principal, *, session: bool) -> Iterator[None]:
        """Holds a place for one call; QuotaExceeded or Overloaded if there is none."""
        usage = self._usage(principal)
        self._check_calls(principal, usage, session)
        if session and self._sessions >= self._max_sessions:
            raise Overloaded(f"{self._sessions} sessions are open, as many as may")
        usage.calls += 1
        usage.sessions += session
        self._sessions += session
        try:
            yield
        finally:
            usage.calls -= 1
            usage.sessions -= session
            self._sessions -= session

    def check_tokens(self, principal: Principal) -> None:
        """QuotaExceeded if the principal has used its tokens of this minute."""
        limit = principal.quota.tokens_per_minute
        if limit is None:
            return
        usage = self._forgiven(principal, limit)
        if usage.owed >= limit:
            wait = (usage.owed - limit + 1) * _MINUTE / limit
            raise _exceeded(principal, f"{limit} tokens a minute; try again in {wait:.3g} s", wait)

    def count_tokens(self, principal: Principal, tokens: int) -> None:
        limit = principal.quota.tokens_per_minute
        if limit is not None:
            self._forgiven(principal, limit).owed += tokens

    def _check_calls(self, principal: Principal, usage: Usage, session: bool) -> None:
        quota = self._with_defaults(principal)
        if quota.max_calls is not None and usage.calls >= quota.max_calls:
            raise _exceeded(principal, f"{quota.max_calls} calls at a time", _RETRY_SECONDS)
        if session and quota.max_sessions is not None and usage.sessions >= quota.max_sessions:
            raise _exceeded(principal, f"{quota.max_sessions} sessions at a time", _RETRY_SECONDS)

    def _with_defaults(self, principal: Principal) -> Quota:
        quota = principal.quota
        # Where nobody is told from anybody, a share of one's own means nothing.
        if quota.max_sessions is None and principal.name:
            return Quota(quota.max_calls, self._max_sessions_each, quota.tokens_per_minute)
        return quota

    def _usage(self, principal: Principal) -> Usage:
        return self._usages.setdefault(principal.name, Usage(at=self._clock()))

    def _forgiven(self, principal: Principal, limit: int) -> Usage:
        """The usage as of now: a minute forgives `limit` tokens."""
        usage, now = self._usage(principal), self._clock()
        usage.owed = max(0.0, usage.owed - (now - usage.at) * limit / _MINUTE)
        usage.at = now
        return usage


def _exceeded(principal: Principal, allowed: str, retry_seconds: float) -> QuotaExceeded:
    return QuotaExceeded(
        f"{principal.name!r} may have {allowed}",
        subject=f"principal:{principal.name}",
        retry_seconds=retry_seconds,
    )
