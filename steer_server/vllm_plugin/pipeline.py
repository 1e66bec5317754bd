"""Takes a step's results from the pipeline stage that made them to the last one, which alone answers the scheduler.

They travel with the hidden states: one more tensor among those that a stage sends to the next in every step.
"""

import functools
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import get_pp_group, get_tp_group

_NAME = "steer"

Results = list[Any]
"""Whatever pickles; one entry per stage that had something to say."""


def relay(runner: Any, end_pass: Callable[[], Any], arrived: Results) -> Callable[..., Any]:
    """`runner.execute_model`, to be set on the instance of a stage.

    After its forward pass a stage that is not the last calls `end_pass` and sends what it returns, if true, behind
    what it received. On the last stage `arrived` holds the earlier stages' results from the pass on; it is
    overwritten by the next.
    """
    execute = runner.execute_model
    sends = not get_pp_group().is_last_rank
    speaks = get_tp_group().rank_in_group == 0

    @functools.wraps(execute)
    def execute_model(
        scheduler_output: Any, intermediate_tensors: Any = None, *rest: Any, **named: Any
    ) -> Any:
        if named.get("dummy_run"):
            # The V2 runner warms up through here.
            return execute(scheduler_output, intermediate_tensors, *rest, **named)
        arrived.clear()
        if intermediate_tensors is not None:
            # The runner copies every tensor it is given into a buffer of the same name, so ours must not reach it.
            packed = intermediate_tensors.tensors.pop(_NAME, None)
            if packed is not None:
                arrived.extend(unpack(packed))
        output = execute(scheduler_output, intermediate_tensors, *rest, **named)
        if sends and scheduler_output.total_num_scheduled_tokens:
            own = end_pass()
            # A replayed CUDA graph returns the tensors of the step before, with what was added to them.
            output.tensors.pop(_NAME, None)
            if speaks and (own or arrived):
                parts = [*arrived, own] if own else arrived
                output.tensors[_NAME] = pack(parts, get_tp_group().world_size)
        return output

    return execute_model


def pack(results: Results, ranks: int) -> Tensor:
    """`results` as bytes, of a length that vLLM does not cut into shares for `ranks` tensor-parallel ranks.

    Where that is possible it has each rank send a share (`GroupCoordinator._should_use_all_gather`), but the others
    have no such tensor. Unpickling ignores what follows the pickle.
    """
    data = bytearray(pickle.dumps(results, protocol=pickle.HIGHEST_PROTOCOL))
    if ranks > 1 and len(data) % ranks == 0:
        data.append(0)
    return torch.frombuffer(data, dtype=torch.uint8)


def unpack(packed: Tensor) -> Results:
    return pickle.loads(packed.numpy().tobytes())


def make_buffers(runner: Any) -> None:
    """Where a later stage puts what it receives, which vLLM makes in the warm-up that an eager CPU engine skips."""
    if not get_pp_group().is_first_rank and runner.intermediate_tensors is None:
        runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
            batch_size=runner.max_num_tokens,
            dtype=runner.model_config.dtype,
            device=runner.device,
        )
