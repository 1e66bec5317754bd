"""What both of vLLM's model runners have in common: the outputs they return."""

from collections.abc import Callable
from typing import Any

from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from steer_server.vllm_plugin import KEY


class OutputWithReports(AsyncModelRunnerOutput):
    """A model runner's promise of an output, with the step's reports on it once it is kept."""

    def __init__(self, promise: AsyncModelRunnerOutput, reports: Callable[[], list[Any]]) -> None:
        self._promise = promise
        self._reports = reports

    def get_output(self) -> ModelRunnerOutput:
        """Called once, under async scheduling by a thread of its own while the next step may be running."""
        return _with(self._promise.get_output(), self._reports())


def with_reports(output: Any, reports: Callable[[], list[Any]]) -> Any:
    """`output` of `sample_tokens`, carrying what `reports` returns to the scheduler.

    `reports` waits for the device, and so is called no earlier than vLLM itself waits.
    """
    if isinstance(output, AsyncModelRunnerOutput):
        return OutputWithReports(output, reports)
    return _with(output, reports())


def _with(output: ModelRunnerOutput, reports: list[Any]) -> ModelRunnerOutput:
    setattr(output, KEY, reports)
    return output
