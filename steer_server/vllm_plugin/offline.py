"""vLLM's offline `LLM`: a call that ends with an error leaves nothing behind for the next one."""

import functools
import sys
from typing import Any

from steer_server.errors import SteerError

_LLM = "vllm.entrypoints.llm"


def guard() -> None:
    """For a process that has loaded `LLM`; elsewhere it does nothing.

    vLLM gives what is left of a call that raised with the outputs of the next one, in front of them.
    """
    loaded: Any = sys.modules.get(_LLM)
    if loaded is None or hasattr(loaded.LLM._run_engine, "_steer"):
        return
    run = loaded.LLM._run_engine

    @functools.wraps(run)
    def run_engine(self: Any, *rest: Any, **named: Any) -> Any:
        try:
            return run(self, *rest, **named)
        except SteerError:
            engine, processor = self.llm_engine, self.llm_engine.output_processor
            # What else came of the step that raised.
            left = processor.process_outputs([])
            engine.engine_core.abort_requests(left.reqs_to_abort)
            engine.abort_request(
                [*processor.request_states, *processor.parent_requests], internal=True
            )
            raise

    run_engine._steer = True  # type: ignore[attr-defined]
    loaded.LLM._run_engine = run_engine
