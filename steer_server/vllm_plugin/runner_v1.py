"""The seam in vLLM's V1 model runner (CPU, older GPUs)."""

import functools
from typing import Any

import numpy as np

from steer_server.vllm_plugin.requests import Tokens
from steer_server.vllm_plugin.runtime import Runtime


def attach(runner: Any, runtime: Runtime) -> None:
    """Tells `runtime` the rows of each step, once vLLM has brought its batch up to date."""
    prepare = runner._prepare_inputs

    @functools.wraps(prepare)
    def prepare_inputs(scheduler_output: Any, counts: np.ndarray, *rest: Any, **named: Any) -> Any:
        prepared = prepare(scheduler_output, counts, *rest, **named)
        batch = runner.input_batch
        starts = batch.num_computed_tokens_cpu[: batch.num_reqs].astype(np.int64)

        def tokens_of(index: int) -> Tokens:
            # The step's own rows on the device, because the batch on the host lacks tokens that async scheduling has
            # not brought there; reading them waits for the device.
            shift = int(counts[:index].sum()) - int(starts[index])
            return lambda start, stop: runner.input_ids.gpu[start + shift : stop + shift].tolist()

        runtime.begin_step(batch.req_ids, counts.astype(np.int64), starts, tokens_of)
        return prepared

    runner._prepare_inputs = prepare_inputs
