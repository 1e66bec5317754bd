"""The seam in vLLM's V2 model runner (CUDA's default)."""

import functools
from typing import Any

import numpy as np

from steer_server.vllm_plugin.requests import Tokens
from steer_server.vllm_plugin.runtime import Runtime


def attach(runner: Any, runtime: Runtime) -> None:
    """Tells `runtime` the rows of each step, in the order of the batch: decoding requests first."""
    prepare = runner.prepare_inputs

    @functools.wraps(prepare)
    def prepare_inputs(*args: Any, **named: Any) -> Any:
        batch = prepare(*args, **named)

        def tokens_of(index: int) -> Tokens:
            # The batch's own rows, which are all that a step asks for; reading them waits for the device.
            first = int(batch.query_start_loc_np[index]) - int(batch.num_computed_tokens_np[index])
            return lambda start, stop: batch.input_ids[first + start : first + stop].tolist()

        # Counts and starts of the tokens as scheduled; exact, since drafts and context parallelism are refused.
        runtime.begin_step(
            batch.req_ids,
            batch.num_scheduled_tokens.astype(np.int64),
            batch.num_computed_tokens_np.astype(np.int64),
            tokens_of,
        )
        return batch

    runner.prepare_inputs = prepare_inputs
