"""How long steer's own code runs, by timers put around its entry points in running processes.

A clock that is read inside the very steps it judges needs no second engine to compare with, so that a noisy machine
tells it from a hundredth of a percent on. It does not see what steer makes vLLM do besides: the call of the custom op
(some 10 us for each site and step), the scheduler's count of slots, the bytes of a report on their way between
processes, and caches left cold.
"""

import functools
import time
from typing import Any

from steer_server.vllm_plugin import exchange
from steer_server.vllm_plugin.frontend import Frontend

_seconds = 0.0


def watch_worker(worker: Any) -> None:
    """In the process of a worker, called there by `collective_rpc`."""
    for name in ("admit", "update", "forget", "begin_step", "at_site", "end_step", "report"):
        _watch(worker.steer, name)


def watch_frontend() -> None:
    for name in ("admit", "receive"):
        _watch(Frontend, name)
    _watch(exchange, "step")


def seconds(_worker: Any = None) -> float:
    """Since the process was watched."""
    return _seconds


def _watch(owner: Any, name: str) -> None:
    run = getattr(owner, name)

    @functools.wraps(run)
    def timed(*arguments: Any, **named: Any) -> Any:
        global _seconds
        began = time.perf_counter()
        try:
            return run(*arguments, **named)
        finally:
            _seconds += time.perf_counter() - began

    setattr(owner, name, timed)
