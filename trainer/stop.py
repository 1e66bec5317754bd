"""Ctrl-C and SIGTERM as a question the work asks itself between two steps."""

import signal
from types import FrameType, TracebackType
from typing import Self

from trainer.errors import Interrupted


class Stop:
    """While entered, the first SIGINT or SIGTERM sets `requested`; a second one breaks off at once."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> Self:
        self._before = {
            number: signal.signal(number, self._on_signal)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self, done: str) -> None:
        """Raises Interrupted once a stop is requested; `done` says what is already on disk."""
        if self.requested:
            raise Interrupted(f"stopped; {done}. The same command goes on from there.")

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
