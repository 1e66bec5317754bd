"""How long steer's own code runs, by timers put around its entry points in running processes.

A clock that is read inside the very steps it judges needs no second engine to compare with, so that a noisy machine
tells it from a hundredth of a percent on. What a program and a report cost on their way between processes is counted, too:
each is carried once more where the front-end has it in hand. It does not see what else steer makes vLLM do: the call of
the custom op (some 10 us for each site and step), the scheduler's count of slots, and caches left cold.
"""

import functools
import pickle
import time
from collections.abc import Callable
from typing import Any

from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from steer_server.vllm_plugin import exchange
from steer_server.vllm_plugin.frontend import Frontend

_seconds = 0.0


def watch_worker(worker: Any) -> None:
    """In the process of a worker, called there by `collective_rpc`."""
    for name in ("admit", "update", "forget", "begin_step", "at_site", "end_step", "report"):
        _watch(worker.steer, name)


def watch_frontend() -> None:
    _carry_again(Frontend, "admit", lambda request, *_: request.sampling_params.extra_args)
    _carry_again(Frontend, "_enter", lambda content: content)
    for name in ("admit", "receive"):
        _watch(Frontend, name)
    _watch(exchange, "step")


def seconds(_worker: Any = None) -> float:
    """Since the process was watched."""
    return _seconds


def _carry_again(owner: type, name: str, content: Callable[..., Any]) -> None:
    """Makes a method take as long as it and the way of what it handles: front-end to engine to worker, or back."""
    run = getattr(owner, name)
    encoder, decoder = MsgpackEncoder(), MsgpackDecoder()

    @functools.wraps(run)
    def carried(self: Any, *arguments: Any) -> Any:
        result = run(self, *arguments)
        if (load := content(*arguments)) is not None:
            decoder.decode(encoder.encode(load))
            pickle.loads(pickle.dumps(load, pickle.HIGHEST_PROTOCOL))
        return result

    setattr(owner, name, carried)


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
