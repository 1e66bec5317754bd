"""The end of a call whose caller may not make it any more."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from steer_server.api.auth import Principal, TokenFile
from steer_server.errors import PermissionDenied, SteerError

LOOK_SECONDS = 1.0


@contextmanager
def until_revoked(tokens: TokenFile, token: str, admitted: Principal) -> Iterator[None]:
    """Cancels what its block waits for when the token has left the file, or lost a scope that it had.

    The block then raises Unauthenticated or PermissionDenied. For the task that enters it.
    """
    version = None

    def look() -> None:
        nonlocal version
        # None at first: the file may have changed right after `admitted` was found in it.
        before, version = version, tokens.version
        if version == before:
            return
        lost = admitted.scopes - tokens.find(token).scopes
        if lost:
            raise PermissionDenied(
                f"{admitted.name!r} has lost scope {', '.join(sorted(lost))} while the call ran"
            )

    with _while_passes(look, LOOK_SECONDS):
        yield


@contextmanager
def _while_passes(look: Callable[[], None], seconds: float) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None
    cancelling = task.cancelling()
    refusal: SteerError | None = None

    def again() -> None:
        nonlocal refusal, timer
        try:
            look()
        except SteerError as error:
            refusal = error
            task.cancel()
        else:
            timer = loop.call_later(seconds, again)

    timer = loop.call_later(seconds, again)
    try:
        yield
    except asyncio.CancelledError as cancelled:
        # Somebody else may have cancelled the task as well, and then it has to end.
        if refusal is None or task.uncancel() > cancelling:
            raise
        raise refusal from cancelled
    finally:
        timer.cancel()
