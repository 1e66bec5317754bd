"""Carries each step's results from the worker to the front-end, with the token they belong to."""

from collections import defaultdict
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.outputs import ModelRunnerOutput

from steer_server.vllm_plugin.wire import KEY


class SteerScheduler(Scheduler):
    """vLLM's scheduler; the engine names it as `scheduler_cls`."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self._results: dict[str, list[Any]] = defaultdict(list)
        """By request: steps that produced no token, such as the chunks of a long prompt."""

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for request_id, result in getattr(model_runner_output, "steer", {}).items():
            self._results[request_id].append(result)
        if not self._results:
            return outputs
        for group in outputs.values():
            for output in group.outputs:
                results = self._results.pop(output.request_id, None)
                if results is not None:
                    output.kv_transfer_params = {
                        **(output.kv_transfer_params or {}),
                        KEY: results,
                    }
        for request_id in [name for name in self._results if name not in self.requests]:
            del self._results[request_id]
        return outputs
